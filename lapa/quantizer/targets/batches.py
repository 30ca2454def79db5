"""Batches of frame pairs with what the target and the conditioning ask for.

Actions reach training here and nowhere else: those of a share of the TRAINING episodes, and only where
`grounding.share_of_episodes` asks for it.
"""

import numpy as np
import torch
from torch import Tensor

from lapa import distributed
from lapa.data import FramePairs, to_float
from lapa.mixture import Draw
from lapa.quantizer.targets.base import PairBatch
from lapa.schema import LatentConsistencyTarget, TrainQuantizerConfig
from lapa.text import encode_text


class PairSampler:
    """Draws the batch of a step from a generator seeded by that step.

    draw: which pairs, of a mixture; None: all are as likely.

    Raises ValueError where the store lacks what an option needs: instructions, states or actions.
    """

    def __init__(self, pairs: FramePairs, config: TrainQuantizerConfig, device: torch.device, draw: Draw | None = None):
        self.pairs, self.batch_size, self.device = pairs, config.training.batch_size, device
        self.draw = draw or (lambda generator, count: generator.integers(len(pairs), size=count))
        store = pairs.store
        self.episode_of_frame = store.episode_of_frame()
        target = config.target
        self.max_gap_ratio, self.shift_pixels = 1.0, None
        if isinstance(target, LatentConsistencyTarget):
            if target.max_gap_ratio < 1 or target.shift_pixels < 0:
                raise ValueError(
                    f"target.max_gap_ratio is {target.max_gap_ratio} and target.shift_pixels {target.shift_pixels}: "
                    "expected at least 1 and at least 0"
                )
            self.max_gap_ratio, self.shift_pixels = target.max_gap_ratio, target.shift_pixels
            self.steps_left = store.steps_left()
        self.words_EW = None
        if config.language.share_of_steps > 0:
            if not any(store.instructions):
                raise ValueError(
                    f"{store.folder} has no instructions, language.share_of_steps is "
                    f"{config.language.share_of_steps}: ingest with captions, or set it to 0"
                )
            self.words_EW = encode_text(store.instructions, config.language.max_words)
        self.states = None
        if config.proprioception.weight > 0:
            if store.states is None:
                raise ValueError(
                    f"{store.folder} has no states, proprioception.weight is {config.proprioception.weight}: "
                    "name the same episodes with states in probe_data, or set it to 0"
                )
            self.states = store.states
        self.is_labelled: np.ndarray | None = None
        if config.grounding.share_of_episodes > 0:
            self.is_labelled = self._choose_labelled(config)

    def _choose_labelled(self, config: TrainQuantizerConfig) -> np.ndarray:
        """(N,) whether a pair belongs to a training episode whose actions may be seen."""
        grounding, store = config.grounding, self.pairs.store
        if store.actions is None:
            raise ValueError(
                f"{store.folder} has no actions, grounding.share_of_episodes is {grounding.share_of_episodes}: "
                "name the same episodes with actions in probe_data, or set it to 0"
            )
        for name in ("share_of_episodes", "share_of_batch"):
            if not 0 < getattr(grounding, name) <= 1:
                raise ValueError(f"grounding.{name} is {getattr(grounding, name)}: expected more than 0, at most 1")
        episode_of_pair = self.episode_of_frame[self.pairs.first_frames]
        episodes = np.unique(episode_of_pair)
        count = max(1, round(grounding.share_of_episodes * len(episodes)))
        chosen = np.random.default_rng(grounding.seed).permutation(episodes)[:count]
        is_labelled = np.isin(episode_of_pair, chosen)
        self.labelled_pairs = np.flatnonzero(is_labelled)
        # Spread over the batch, so that every data-parallel slice of it has its share.
        num_labelled = max(1, round(grounding.share_of_batch * self.batch_size))
        self.labelled_places = np.arange(num_labelled) * self.batch_size // num_labelled
        return is_labelled

    def __call__(self, generator: np.random.Generator) -> PairBatch:
        indices = self.draw(generator, self.batch_size)
        if self.is_labelled is not None:
            picks = generator.integers(len(self.labelled_pairs), size=len(self.labelled_places))
            indices[self.labelled_places] = self.labelled_pairs[picks]
        shifts, farther = None, None
        if self.shift_pixels is not None:
            shifts = generator.integers(-self.shift_pixels, self.shift_pixels + 1, size=(self.batch_size, 2, 2))
            farther = generator.random(self.batch_size)
        # Drawn for the whole batch, then cut, so that any number of processes trains on the same numbers.
        own = distributed.shard(self.batch_size)
        indices = indices[own]
        first = self.pairs.first_frames[indices]
        batch = PairBatch(to_float(self.pairs.frames(indices), self.device))
        if shifts is not None and farther is not None:
            gaps = self.pairs.gaps[indices]
            farthest = np.minimum((self.max_gap_ratio * gaps).astype(np.int64), self.steps_left[first])
            ahead = gaps + np.floor(farther[own] * (farthest - gaps + 1)).astype(np.int64)
            batch.further_BCHW = to_float(self.pairs.store.frames[first + ahead], self.device)
            batch.shifts_BV2 = torch.from_numpy(shifts[own]).to(self.device)
        if self.words_EW is not None:
            batch.words_BW = self.words_EW[self.episode_of_frame[first]].to(self.device)
        if self.states is not None:
            states = self.states[self.pairs.frame_numbers(indices)]
            batch.states_B2S = torch.from_numpy(states).to(self.device)
        if self.is_labelled is not None:
            has_action = self.is_labelled[indices]
            actions = np.where(has_action[:, None], self.pairs.displacements(indices), 0).astype(np.float32)
            batch.actions_BA = torch.from_numpy(actions).to(self.device)
            batch.has_action_B = torch.from_numpy(has_action).to(self.device)
        return batch

    def action_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (A,) of the displacements that training may see."""
        actions = self.pairs.displacements(self.labelled_pairs)
        return _mean(actions), _deviation(actions)

    def state_statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation (S,) of the first frames' states, and deviation of their change to the second."""
        assert self.states is not None
        present = self.states[self.pairs.first_frames]
        change = self.states[self.pairs.first_frames + self.pairs.gaps] - present
        return _mean(present), _deviation(present), _deviation(change)


def _mean(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.mean(0).astype(np.float32))


def _deviation(values: np.ndarray) -> Tensor:
    """Standard deviation of each column; 1 where a column hardly varies beside the others."""
    deviation = values.std(0)
    deviation = np.where(deviation > 1e-3 * max(deviation.max(), 1e-6), deviation, 1.0)
    return torch.from_numpy(deviation.astype(np.float32))
