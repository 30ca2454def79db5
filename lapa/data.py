"""Episodes decoded once into a memory map, and the frame pairs and chunks drawn from them.

A frame store is a folder:

    store.json          sizes, frame rate, an instruction and a source an episode, what was skipped and why
    index.safetensors   episode_offsets (E + 1) int64; action (N, A) and state (N, S) float32 where known
    frames.u8           raw RGB bytes (N, H, W, 3), all episodes one after the other

`lapa ingest` writes one from video files; a LeRobotDataset v3 folder is decoded into one on first use.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from lapa.checkpoint import read_json, write_json, write_tensors

FORMAT_VERSION = 1
STILL = 1e-6  # a number whose standard deviation is below never moved
NEAR = 0.5  # standard deviations of the state, within which actions are taken for positions


@dataclass(frozen=True)
class FrameStore:
    """Read access to a frame store.

    frames: (N, H, W, 3) uint8 memory map. episode_offsets: (E + 1). actions (N, A) and states (N, S) are
    float32 or None; the action of frame t is the one executed from it. instructions and sources: one an episode.
    fps is the rate of most episodes; episode_fps (E,) that of each, None where all have the same.
    """

    folder: Path
    frames: np.ndarray
    episode_offsets: np.ndarray
    fps: float
    instructions: list[str]
    sources: list[str]
    actions: np.ndarray | None
    states: np.ndarray | None
    skipped: list[dict]
    episode_fps: np.ndarray | None = None

    @property
    def num_episodes(self) -> int:
        return len(self.episode_offsets) - 1

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def image_size(self) -> int:
        return self.frames.shape[1]

    def episode_of_frame(self) -> np.ndarray:
        """(N,) episode index of every frame."""
        return np.repeat(np.arange(self.num_episodes), np.diff(self.episode_offsets))

    def steps_left(self) -> np.ndarray:
        """(N,) frames that follow each frame within its episode."""
        return np.repeat(self.episode_offsets[1:], np.diff(self.episode_offsets)) - 1 - np.arange(self.num_frames)

    @cached_property
    def actions_are_positions(self) -> bool:
        """Whether an action says where to go, as joint positions do, and not how far; False without states."""
        if self.actions is None or self.states is None or self.actions.shape[1] != self.states.shape[1]:
            return False
        near_state, near_change = action_nearness(self.actions, self.states, self.episode_offsets)
        return near_state < min(NEAR, near_change)

    @property
    def fingerprint(self) -> str:
        """Identifies the frames and their order, so that labels are never used with other data."""
        digest = hashlib.sha256(self.episode_offsets.tobytes())
        picks = np.linspace(0, self.num_frames - 1, min(64, self.num_frames)).astype(int)
        digest.update(np.ascontiguousarray(self.frames[picks]).tobytes())
        return digest.hexdigest()[:16]


def open_frames(path: str | Path, image_size: int, cache_dir: str | None = None) -> FrameStore:
    """Open a frame store, or decode a LeRobotDataset v3 folder into a cached one.

    Raises ValueError where `path` is neither, or holds frames of another size.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"no folder {path}: expected a LeRobotDataset v3 or the output of `lapa ingest`")
    if (path / "store.json").is_file():
        store = read_store(path)
        if store.image_size != image_size:
            raise ValueError(
                f"{path} holds {store.image_size} px frames, image_size is {image_size}: "
                f"set image_size={store.image_size} or ingest again"
            )
        return store
    if not (path / "meta" / "info.json").is_file():
        raise ValueError(
            f"{path} is neither a LeRobotDataset (no meta/info.json) nor a frame store (no store.json): "
            "for a folder of video files run `lapa ingest` first"
        )
    version = str(read_json(path / "meta" / "info.json").get("codebase_version"))
    if version.startswith("v2"):
        raise ValueError(f"{path} is of LeRobot version {version}: run `lapa convert data={path} output_dir=...` first")
    cache_root = Path(cache_dir or os.environ.get("LAPA_CACHE") or "~/.cache/lapa").expanduser()
    folder = cache_root / f"{path.resolve().name}-{_dataset_key(path)}-{image_size}px"
    cache_root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "store.json").is_file():
            _decode_dataset(path, folder, image_size)
    return read_store(folder)


def read_store(folder: Path) -> FrameStore:
    """Open the frame store in `folder`; ValueError where its files do not fit together."""
    meta = read_json(folder / "store.json")
    if meta.get("version") != FORMAT_VERSION:
        raise ValueError(f"{folder} has frame store version {meta.get('version')}, expected {FORMAT_VERSION}")
    index = load_file(folder / "index.safetensors")
    shape = (meta["num_frames"], meta["image_size"], meta["image_size"], 3)
    clip_fps = np.array(meta.get("clip_fps", []), np.float64)
    expected, found = int(np.prod(shape)), (folder / "frames.u8").stat().st_size
    if expected != found:
        raise ValueError(f"{folder}/frames.u8 has {found} bytes, expected {expected}: delete the folder and run again")
    return FrameStore(
        folder=folder,
        frames=np.memmap(folder / "frames.u8", np.uint8, "r", shape=shape),
        episode_offsets=index["episode_offsets"].numpy(),
        fps=float(meta["fps"]),
        instructions=meta["instructions"],
        sources=meta["sources"],
        actions=index["action"].numpy() if "action" in index else None,
        states=index["state"].numpy() if "state" in index else None,
        skipped=meta["skipped"],
        episode_fps=clip_fps if (clip_fps != float(meta["fps"])).any() else None,
    )


def _dataset_key(path: Path) -> str:
    """Changes whenever a file of the data set changes."""
    digest = hashlib.sha256(str(path.resolve()).encode())
    for file in sorted(p for p in path.rglob("*") if p.suffix in (".json", ".parquet", ".mp4")):
        stat = file.stat()
        digest.update(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _decode_dataset(path: Path, folder: Path, image_size: int) -> None:
    """Decode every episode of a LeRobotDataset, in order and once, into a new frame store."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(path.name, root=path, video_backend="pyav")
    camera_keys = dataset.meta.camera_keys
    if not camera_keys:
        raise ValueError(
            f"{path} has no images: its features are {sorted(dataset.meta.features)}; "
            "expected a key observation.images.*"
        )
    camera = camera_keys[0]
    table = dataset.hf_dataset.with_format("numpy")
    rows_of_episode = np.asarray(table["episode_index"])
    values = {
        name: np.stack(list(table[key])).astype(np.float32)
        for name, key in (("action", "action"), ("state", "observation.state"))
        if key in dataset.meta.features
    }
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    offsets, kept_rows, instructions, sources, skipped = [0], [], [], [], []
    with (temporary / "frames.u8").open("wb") as file:
        for episode in tqdm(range(dataset.meta.total_episodes), desc="decode", unit="episode", mininterval=1.0):
            rows = np.flatnonzero(rows_of_episode == episode)
            try:
                frames = _episode_frames(dataset, camera, episode, rows, image_size)
            except Exception as error:  # any decoder failure costs one episode, never the run
                skipped.append({"clip": f"episode {episode}", "reason": f"{type(error).__name__}: {error}"})
                continue
            file.write(frames.tobytes())
            offsets.append(offsets[-1] + len(frames))
            kept_rows.append(rows)
            instructions.append(_instruction(dataset, episode))
            sources.append(path.resolve().name)
    if not kept_rows:
        raise ValueError(f"no episode of {path} could be decoded; the first failure: {skipped[:1]}")
    rows = np.concatenate(kept_rows)
    index = {"episode_offsets": torch.tensor(offsets, dtype=torch.int64)}
    index |= {name: torch.from_numpy(value[rows]) for name, value in values.items()}
    write_tensors(temporary / "index.safetensors", index)
    write_json(
        temporary / "store.json",
        {
            "version": FORMAT_VERSION,
            "num_frames": offsets[-1],
            "image_size": image_size,
            "fps": dataset.meta.fps,
            "instructions": instructions,
            "sources": sources,
            "skipped": skipped,
        },
    )
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _instruction(dataset, episode: int) -> str:
    tasks = dataset.meta.episodes[episode]["tasks"]
    return tasks[0] if len(tasks) else ""


def _episode_frames(dataset, camera: str, episode: int, rows: np.ndarray, image_size: int) -> np.ndarray:
    """(T, S, S, 3) uint8 frames of one episode, decoded sequentially."""
    if camera in dataset.meta.video_keys:
        meta = dataset.meta.episodes[episode]
        start_s = float(meta[f"videos/{camera}/from_timestamp"])
        video = Path(dataset.root) / dataset.meta.get_video_file_path(episode, camera)
        frames = _decode_span(video, start_s, len(rows), dataset.meta.fps, image_size)
    else:
        frames = [np.asarray(dataset[int(row)][camera].permute(1, 2, 0) * 255).round() for row in rows]
        frames = [_resize(frame.astype(np.uint8), image_size) for frame in frames]
    if len(frames) != len(rows):
        raise ValueError(f"decoded {len(frames)} frames of {len(rows)}")
    return np.stack(frames)


def _decode_span(video: Path, start_s: float, num_frames: int, fps: float, image_size: int) -> list[np.ndarray]:
    return [_resize(frame, image_size) for frame in decode_span(video, start_s, num_frames, fps)]


def decode_span(video: Path, start_s: float, num_frames: int, fps: float) -> Iterator[np.ndarray]:
    """Up to num_frames frames (H, W, 3) uint8 whose timestamps begin at `start_s`, from the last keyframe before it."""
    import av

    num_left = num_frames
    with av.open(str(video), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"
        assert stream.time_base is not None
        container.seek(int(start_s / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time is None or frame.time < start_s - 0.5 / fps:
                continue
            yield frame.to_ndarray(format="rgb24")
            num_left -= 1
            if not num_left:
                return


def _resize(frame: np.ndarray, image_size: int) -> np.ndarray:
    if frame.shape[:2] == (image_size, image_size):
        return frame
    import cv2

    return cv2.resize(frame, (image_size, image_size), interpolation=cv2.INTER_AREA)


def to_float(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).to(device).movedim(-1, -3).float().div_(255)


class FrameGap(int):
    """A gap in frames at the store's rate, which also knows what it is in episodes of other rates.

    of_episode: (E,) frames, or None where every episode has the gap that the number itself says.
    """

    of_episode: np.ndarray | None = None


def frame_gap(store: FrameStore, gap_s: float, gap_frames: int | None) -> FrameGap:
    """The gap in frames, from seconds or stated; ValueError where it would be zero.

    A gap in seconds is another number of frames in an episode of another rate; one stated in frames is the same in
    all of them.
    """
    slowest = store.fps if store.episode_fps is None else min(store.fps, store.episode_fps.min())
    gap = FrameGap(gap_frames if gap_frames is not None else round(gap_s * store.fps))
    if gap < 1 or (gap_frames is None and round(gap_s * slowest) < 1):
        raise ValueError(
            f"a frame gap of {gap_s} s is {round(gap_s * slowest) if gap_frames is None else gap} frames at {slowest} "
            f"frames/s: raise frame_gap_s to at least {1 / slowest:.3f}"
        )
    if gap_frames is None and store.episode_fps is not None:
        gap.of_episode = np.round(gap_s * store.episode_fps).astype(np.int64)
    return gap


def split_episodes(
    store: FrameStore, fraction: float, seed: int, holdout_sources: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Episode indices (trained on, held out), by source where sources are named, else at random."""
    if holdout_sources:
        unknown = sorted(set(holdout_sources) - set(store.sources))
        if unknown:
            raise ValueError(
                f"holdout_sources {unknown} are not in {store.folder}: it has {sorted(set(store.sources))}"
            )
        held_out = np.isin(np.array(store.sources), holdout_sources)
    else:
        order = np.random.default_rng(seed).permutation(store.num_episodes)
        held_out = np.zeros(store.num_episodes, bool)
        held_out[order[: round(fraction * store.num_episodes)]] = True
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if not len(train) or (fraction > 0 and not len(test)):
        raise ValueError(f"{store.num_episodes} episodes split into {len(train)} and {len(test)}: more are needed")
    return train, test


class FramePairs:
    """All pairs (t, t + gap) within the given episodes of a store.

    gap: frames; a `FrameGap` of `frame_gap` lasts as long in episodes of other rates. first_frames and gaps (P,) say
    where each pair begins and how many frames later it ends.
    """

    def __init__(self, store: FrameStore, gap: int, episodes: np.ndarray):
        self.store, self.gap = store, gap
        episode_of_frame = store.episode_of_frame()
        of_episode = gap.of_episode if isinstance(gap, FrameGap) else None
        gaps = np.full(store.num_frames, gap) if of_episode is None else of_episode[episode_of_frame]
        eligible = (store.steps_left() >= gaps) & np.isin(episode_of_frame, episodes)
        self.first_frames = np.flatnonzero(eligible)
        self.gaps = gaps[eligible]
        if not len(self.first_frames):
            raise ValueError(f"no episode is longer than the frame gap of {gap} frames: lower frame_gap_s")

    def __len__(self) -> int:
        return len(self.first_frames)

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """(B, 2, H, W, 3) uint8 for pair indices (B,)."""
        return self.store.frames[self.frame_numbers(indices)]

    def frame_numbers(self, indices: np.ndarray) -> np.ndarray:
        """(B, 2): where in the store the two frames of each pair are."""
        first = self.first_frames[indices]
        return np.stack([first, first + self.gaps[indices]], axis=1)

    def displacements(self, indices: np.ndarray) -> np.ndarray:
        """(B, A): how far the robot went between the two frames; needs a store with actions.

        The sum of the actions, or where these are positions to go to, the change of the state.
        """
        if self.store.actions is None:
            raise ValueError(f"{self.store.folder} has no actions")
        first, gaps = self.first_frames[indices], self.gaps[indices]
        if self.store.actions_are_positions:
            assert self.store.states is not None
            return self.store.states[first + gaps] - self.store.states[first]
        sums = np.empty((len(first), self.store.actions.shape[1]), self.store.actions.dtype)
        for gap in np.unique(gaps):
            same = gaps == gap
            sums[same] = self.store.actions[first[same, None] + np.arange(gap)].sum(axis=1)
        return sums


def action_nearness(actions: np.ndarray, states: np.ndarray, episode_offsets: np.ndarray) -> tuple[float, float]:
    """How far actions (N, A) are from the states (N, A), and from what the states change by until the next frame.

    Medians over the dimensions that move, in standard deviations of states and of actions. Positions to go to are a
    small part of one from the state; displacements are less than one from its change. Rows that are not finite do not
    count.
    """
    is_finite = np.isfinite(actions).all(1) & np.isfinite(states).all(1)
    is_next_finite = np.append(is_finite[1:], False)
    is_next_finite[episode_offsets[1:] - 1] = False
    rows = np.flatnonzero(is_finite & is_next_finite)
    if not len(rows):
        return np.inf, np.inf
    moving = (actions[rows].std(0) > STILL) & (states[rows].std(0) > STILL)
    if not moving.any():
        return np.inf, np.inf
    actions, states = actions[:, moving].astype(np.float64), states[:, moving].astype(np.float64)
    changes, actions, states = states[rows + 1] - states[rows], actions[rows], states[rows]
    near_state = np.median(np.abs(actions - states).mean(0) / states.std(0))
    near_change = np.median(np.abs(actions - changes).mean(0) / actions.std(0))
    return float(near_state), float(near_change)


def action_chunks(
    store: FrameStore, chunk_size: int, labels: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Actions (N, T, A) from every frame on, and padding (N, T): True past the episode's last action.

    labels: actions (N, A) in place of the store's own, and which are known (N,); padding is True for the others too.
    """
    if labels is not None:
        actions, is_known = labels
    elif store.actions is not None:
        actions, is_known = store.actions, np.ones(store.num_frames, bool)
    else:
        raise ValueError(f"{store.folder} has no actions: use a data set recorded with actions")
    ahead = np.arange(chunk_size)
    rows = np.minimum(np.arange(store.num_frames)[:, None] + ahead, store.num_frames - 1)
    is_pad = (ahead[None] > store.steps_left()[:, None]) | ~is_known[rows]
    return np.where(is_pad[..., None], 0.0, actions[rows]).astype(np.float32), is_pad
