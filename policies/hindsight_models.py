"""Which instruction a trajectory carries out, and how well it does: the two models of instruction back-and-forth.

Both are the policy that `lapa finetune` makes of a few labelled pairs; they differ in what they predict.

Forward, pi(actions | observation, instruction): the next actions. A trajectory fits an instruction as far as that
explains its actions better than other instructions do (the margin).

Backward, p(instruction | trajectory): a policy that predicts the whole rest of the trajectory at once, the displacement
from where it is to where it ends, which only hindsight knows. By Bayes' rule

    p(instruction | trajectory) ~ p(instruction) * prod over frames t of p(end - position_t | frame_t, instruction)

with the counts of the labelled instructions as p(instruction), and a sharpness of the product that makes held-out
labels likeliest. Actions are displacements, so their sums are positions.

A policy's loss is a negative log-likelihood: exactly so with action_head=bins, and that of a Laplace distribution of
one width with action_head=chunk.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION

from lapa.checkpoint import write_tensors
from lapa.data import FrameStore, to_float
from lapa.runtime import Compute
from policies.lapa.modeling_lapa import LapaPolicy

BATCH = 256
SHARPNESS = np.geomspace(0.1, 100, 61)


def displacements_to_end(store: FrameStore) -> np.ndarray:
    """(N, A): from every frame, the sum of the actions that remain in its episode."""
    assert store.actions is not None
    sums = np.zeros_like(store.actions)
    for first, behind in zip(store.episode_offsets[:-1], store.episode_offsets[1:], strict=True):
        sums[first:behind] = np.cumsum(store.actions[first:behind][::-1], axis=0)[::-1]
    return sums


def write_hindsight_store(store: FrameStore, folder: Path) -> None:
    """The same frames and instructions, with the displacement to the end as the action of every frame."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        os.link(store.folder / "frames.u8", temporary / "frames.u8")
    except OSError:
        shutil.copyfile(store.folder / "frames.u8", temporary / "frames.u8")
    shutil.copyfile(store.folder / "store.json", temporary / "store.json")
    index = {"episode_offsets": torch.from_numpy(store.episode_offsets), "action": displacements_to_end(store)}
    write_tensors(temporary / "index.safetensors", {name: torch.as_tensor(value) for name, value in index.items()})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


class Likelihood:
    """Negative log-likelihoods of actions under a policy folder, up to what does not depend on the instruction."""

    def __init__(self, folder: Path, compute: Compute):
        config = PreTrainedConfig.from_pretrained(folder)
        config.device = str(compute.device)
        self.policy = LapaPolicy.from_pretrained(folder, config=config).to(compute.device).eval()
        self.preprocess, _ = make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": str(compute.device)}},
        )
        self.chunk_size = self.policy.config.chunk_size
        self.image_key = next(iter(self.policy.config.image_features))
        self.compute = compute

    @torch.no_grad()
    def losses(
        self, frames: np.ndarray, actions: np.ndarray, is_pad: np.ndarray, instructions: Sequence[str]
    ) -> np.ndarray:
        """(I, F) for frames (F, H, W, 3) uint8 with actions (F, T, A) and padding (F, T), under I instructions."""
        rows = np.tile(np.arange(len(frames)), len(instructions))
        texts = [text for text in instructions for _ in range(len(frames))]
        found = []
        for first in range(0, len(rows), BATCH):
            picked = rows[first : first + BATCH]
            batch = self.preprocess(
                {
                    self.image_key: to_float(frames[picked]),
                    ACTION: torch.from_numpy(actions[picked]),
                    "action_is_pad": torch.from_numpy(is_pad[picked]).to(self.compute.device),
                    "task": texts[first : first + BATCH],
                }
            )
            with self.compute.autocast():
                loss_B, _ = self.policy.forward(batch, reduction="none")
            found.append(loss_B.float().cpu().numpy())
        return np.concatenate(found).reshape(len(instructions), len(frames))


def spread(first: int, behind: int, count: int) -> np.ndarray:
    """Up to `count` frame numbers from first to behind - 1, evenly."""
    return np.unique(np.linspace(first, behind - 1, min(count, behind - first)).round().astype(int))


def backward_losses(
    model: Likelihood, store: FrameStore, to_end: np.ndarray, episode: int, instructions: Sequence[str], num_frames: int
) -> np.ndarray:
    """(I,): how badly each instruction explains where the episode ended, summed over some of its frames."""
    first, behind = store.episode_offsets[episode : episode + 2]
    # From the last frame there is hardly a way left that could tell anything.
    frames = spread(first, max(behind - 1, first + 1), num_frames)
    is_pad = np.zeros((len(frames), 1), bool)
    return model.losses(store.frames[frames], to_end[frames][:, None], is_pad, instructions).sum(1)


def forward_losses(
    model: Likelihood,
    store: FrameStore,
    chunks: tuple[np.ndarray, np.ndarray],
    episode: int,
    instructions: Sequence[str],
    num_frames: int,
) -> np.ndarray:
    """(I,): how badly each instruction explains the actions of the episode, a mean over some of its frames.

    chunks: of `lapa.data.action_chunks`.
    """
    first, behind = store.episode_offsets[episode : episode + 2]
    frames = spread(first, behind, num_frames)
    return model.losses(store.frames[frames], chunks[0][frames], chunks[1][frames], instructions).mean(1)


def log_posterior(losses_EI: np.ndarray, log_prior_I: np.ndarray, sharpness: float) -> np.ndarray:
    """(E, I) log p(instruction | trajectory)."""
    scores = log_prior_I - sharpness * losses_EI
    scores = scores - scores.max(1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def fit_sharpness(losses_EI: np.ndarray, log_prior_I: np.ndarray, true_E: np.ndarray) -> float:
    """The sharpness under which the true instructions (E,) of held-out pairs are likeliest."""
    rows = np.arange(len(true_E))
    fits = [log_posterior(losses_EI, log_prior_I, sharpness)[rows, true_E].mean() for sharpness in SHARPNESS]
    return float(SHARPNESS[int(np.argmax(fits))])


def sample_nucleus(log_p_I: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """One index, drawn from the likeliest ones that together have probability top_p (arXiv 1904.09751)."""
    scaled = log_p_I / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    behind = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    kept = order[:behind]
    return int(rng.choice(kept, p=p[kept] / p[kept].sum()))


def distractors(own: str, others: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Up to `count` different instructions among `others` that are not `own`, those given often more likely."""
    drawn = dict.fromkeys(others[i] for i in rng.permutation(len(others)) if others[i] != own)
    return list(drawn)[:count]


def scores_of(margins: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """1 to 5 for margins (E,): how many of the four quintile borders of held-out labelled pairs they exceed, plus 1."""
    borders = np.quantile(calibration, [0.2, 0.4, 0.6, 0.8])
    return 1 + np.searchsorted(borders, margins, side="right")
