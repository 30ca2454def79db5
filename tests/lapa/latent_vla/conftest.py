"""A world that can be learned in seconds: a bright square, named left or right, moves that way."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lapa.checkpoint import write_json, write_tensors
from lapa.data import read_store

EPISODE_LENGTH = 6
GAP = 2


def write_store(folder: Path, num_episodes: int = 20, size: int = 16, seed: int = 0) -> Path:
    """Episodes of 6 frames: a square moves left or right, as the instruction says, and stands in the last frame."""
    generator = np.random.default_rng(seed)
    frames, actions, instructions = [], [], []
    for episode in range(num_episodes):
        direction = 1 if episode % 2 else -1
        column, row = 7 - 4 * direction, int(generator.integers(1, size - 3))
        for step in range(EPISODE_LENGTH):
            frame = np.full((size, size, 3), 60, np.uint8)
            frame[row : row + 3, column : column + 3] = 230
            frames.append(frame)
            moves = step < EPISODE_LENGTH - 1
            actions.append((direction * moves, 0.5 * moves))
            column += direction
        instructions.append(f"go to the {'right' if direction > 0 else 'left'}")
    folder.mkdir(parents=True)
    np.stack(frames).tofile(folder / "frames.u8")
    index = {
        "episode_offsets": torch.arange(num_episodes + 1) * EPISODE_LENGTH,
        "action": torch.tensor(actions, dtype=torch.float32),
    }
    write_tensors(folder / "index.safetensors", index)
    meta = {"version": 1, "num_frames": len(frames), "image_size": size, "fps": 10.0, "skipped": []}
    write_json(folder / "store.json", meta | {"instructions": instructions, "sources": ["toy"] * num_episodes})
    return folder


def write_labels(folder: Path, store_folder: Path, passed: bool = True) -> Path:
    """Labels that a perfect quantizer might give: one token says the direction, one is noise."""
    store = read_store(store_folder)
    is_valid = store.steps_left() >= GAP
    assert store.actions is not None
    latent = np.stack([1 + (store.actions[:, 0] > 0), np.random.default_rng(0).integers(0, 3, store.num_frames)], 1)
    folder.mkdir(parents=True)
    write_tensors(
        folder / "labels.safetensors",
        {
            "latent_action": torch.from_numpy(latent * is_valid[:, None]).long(),
            "is_valid": torch.from_numpy(is_valid),
        },
    )
    write_json(
        folder / "labels.json",
        {
            "quantizer": {},
            "gate": {"passed": passed, "reasons": [] if passed else ["delta_psnr is -0.1 dB"]},
            "is_discrete": True,
            "num_codes": 2,
            "code_length": 2,
            "codebook_size": 3,
            "frame_gap_frames": GAP,
            "frame_gap_s": 0.2,
            "store_fingerprint": store.fingerprint,
            "num_frames": store.num_frames,
        },
    )
    return folder


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("toy") / "store")


@pytest.fixture(scope="session")
def toy_labels(tmp_path_factory, toy_store) -> Path:
    return write_labels(tmp_path_factory.mktemp("toy") / "labels", toy_store)
