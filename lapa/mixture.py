"""Several data sets as one: a batch draws a data set by its weight, then one of its frames.

The data sets stay where they are on disk; `Mixture.store` shows them one after the other as a single frame store. A
mixture of one is that data set itself, and draws the same numbers as if there were no mixture.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lapa.data import FrameStore, open_frames, split_episodes
from lapa.schema import MixturePart

Draw = Callable[[np.random.Generator, int], np.ndarray]


class FramesInSequence:
    """Frames (N, H, W, 3) uint8 of several stores, read by arrays of frame numbers."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)
        self.offsets = np.cumsum([0, *map(len, self.parts)])
        self.shape = (int(self.offsets[-1]), *self.parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        numbers = np.asarray(numbers)
        found = np.empty((*numbers.shape, *self.shape[1:]), np.uint8)
        part_of_number = np.searchsorted(self.offsets, numbers, side="right") - 1
        for part in np.unique(part_of_number):
            here = part_of_number == part
            found[here] = self.parts[part][numbers[here] - self.offsets[part]]
        return found


@dataclass(frozen=True)
class Mixture:
    """Data sets and their weights.

    store: all of them, one after the other, in the order of `parts`. Actions and states are there where every data set
    has them, in the same number of dimensions.
    """

    parts: list[MixturePart]
    stores: list[FrameStore]
    store: FrameStore

    @property
    def first_frames(self) -> np.ndarray:
        """(D + 1,) where the frames of each data set begin in `store`, and where they end."""
        return np.cumsum([0, *(store.num_frames for store in self.stores)])

    def split(
        self, fraction: float, seed: int, holdout_sources: list[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Episodes of `store` (trained on, held out): each data set is split by itself, all alike by source."""
        if holdout_sources:
            return split_episodes(self.store, fraction, seed, holdout_sources)
        splits, first = [], 0
        for store in self.stores:
            splits.append([episodes + first for episodes in split_episodes(store, fraction, seed)])
            first += store.num_episodes
        train, held_out = (np.concatenate(episodes) for episodes in zip(*splits, strict=True))
        return train, held_out

    def sampler(self, frames: np.ndarray) -> Draw:
        """A function of (generator, count) to places in `frames`, which are some frames of `store` in their order.

        Raises ValueError where a data set has none of them.
        """
        bounds = np.searchsorted(frames, self.first_frames)
        first, counts = bounds[:-1], np.diff(bounds)
        if not counts.all():
            part = self.parts[int(np.argmin(counts))]
            raise ValueError(f"{part.path} has no frame to train on: use a larger data set, or leave it out")
        if len(self.parts) == 1:
            return lambda generator, count: generator.integers(counts[0], size=count)
        weights = np.array([part.weight for part in self.parts])

        def draw(generator: np.random.Generator, count: int) -> np.ndarray:
            part_B = generator.choice(len(weights), count, p=weights / weights.sum())
            return first[part_B] + generator.integers(counts[part_B])

        return draw


def open_mixture(
    data: str | None,
    parts: list[MixturePart],
    image_size: int,
    cache_dir: str | None,
    option: str = "data",
    num_episodes: int | None = None,
) -> Mixture:
    """The data sets of a mixture, or the single one of `data`; of each the first num_episodes only, where given.

    Raises ValueError for both or neither of them, and for weights or names of embodiments that cannot be.
    """
    if not data and not parts:
        raise ValueError(f"{option} is required: {option}=..., or several data sets as mixture='[{{path: ...}}, ...]'")
    if data and parts:
        raise ValueError(f"{option}={data} and a mixture of {len(parts)} data sets are given: choose one of them")
    parts = parts or [MixturePart(path=str(data))]
    check_parts(parts)
    # Those of an embodiment stand together.
    names = list(dict.fromkeys(part.embodiment for part in parts))
    parts = sorted(parts, key=lambda part: names.index(part.embodiment))
    stores = [first_episodes(open_frames(part.path, image_size, cache_dir), num_episodes) for part in parts]
    return Mixture(parts, stores, concatenate(stores))


def check_parts(parts: list[MixturePart]) -> None:
    for part in parts:
        if not 0 < part.weight < float("inf"):
            raise ValueError(f"the weight of {part.path} is {part.weight}, expected more than 0: or leave it out")
        if not re.fullmatch(r"[A-Za-z0-9_-]*", part.embodiment):
            raise ValueError(
                f"the embodiment of {part.path} is {part.embodiment!r}, which names a folder: expected letters, "
                "digits, - and _"
            )
    unnamed = [part.path for part in parts if not part.embodiment]
    if unnamed and len(unnamed) < len(parts):
        raise ValueError(f"{unnamed} have no embodiment and other data sets of the mixture have: name it for all")


def concatenate(stores: list[FrameStore]) -> FrameStore:
    """The stores, one after the other, as one; a single one as it is."""
    if len(stores) == 1:
        return stores[0]
    offsets, episode_fps = [np.zeros(1, np.int64)], []
    for store in stores:
        offsets.append(offsets[-1][-1] + store.episode_offsets[1:])
        same = np.full(store.num_episodes, store.fps)
        episode_fps.append(same if store.episode_fps is None else store.episode_fps)
    fps_E = np.concatenate(episode_fps)
    rates, counts = np.unique(fps_E, return_counts=True)
    return FrameStore(
        folder=Path(" + ".join(str(store.folder) for store in stores)),
        frames=FramesInSequence([store.frames for store in stores]),  # type: ignore[arg-type]
        episode_offsets=np.concatenate(offsets),
        fps=float(rates[counts.argmax()]),
        instructions=[text for store in stores for text in store.instructions],
        sources=[source for store in stores for source in store.sources],
        actions=joined([store.actions for store in stores]),
        states=joined([store.states for store in stores]),
        skipped=[clip for store in stores for clip in store.skipped],
        episode_fps=fps_E if len(rates) > 1 else None,
    )


def joined(values: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """All rows, or None where some are missing or have another number of columns."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or len({value.shape[1] for value in known}) > 1:
        return None
    return np.concatenate(known)


def first_episodes(store: FrameStore, num_episodes: int | None) -> FrameStore:
    """The first episodes of a store alone; None: all. ValueError where there are fewer."""
    if num_episodes is None:
        return store
    if not 1 <= num_episodes <= store.num_episodes:
        raise ValueError(f"num_episodes is {num_episodes}, {store.folder} has {store.num_episodes}")
    end = int(store.episode_offsets[num_episodes])
    return replace(
        store,
        frames=store.frames[:end],
        episode_offsets=store.episode_offsets[: num_episodes + 1],
        instructions=store.instructions[:num_episodes],
        sources=store.sources[:num_episodes],
        actions=None if store.actions is None else store.actions[:end],
        states=None if store.states is None else store.states[:end],
        episode_fps=None if store.episode_fps is None else store.episode_fps[:num_episodes],
    )
