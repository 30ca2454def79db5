"""A toy world for tests: a bright disc on a fixed background moves by a random displacement every step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lapa.checkpoint import write_json, write_tensors


def write_store(folder: Path, num_episodes: int = 12, length: int = 8, size: int = 32, seed: int = 0) -> Path:
    """A frame store (lapa/data.py) of moving discs, with the displacement in pixels as the action."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1)
    background = generator.integers(40, 90, (size, size, 3))
    frames, actions = [], []
    for _ in range(num_episodes):
        position = generator.uniform(8, size - 8, 2)
        for _ in range(length):
            target = np.clip(position + generator.uniform(-4, 4, 2), 4, size - 4)
            inside = np.square(grid - position).sum(-1) < 9
            frames.append(np.where(inside[..., None], 240, background).astype(np.uint8))
            actions.append(target - position)
            position = target
    folder.mkdir(parents=True)
    np.stack(frames).tofile(folder / "frames.u8")
    offsets = torch.arange(num_episodes + 1) * length
    write_tensors(
        folder / "index.safetensors",
        {"episode_offsets": offsets, "action": torch.tensor(np.array(actions), dtype=torch.float32)},
    )
    write_json(
        folder / "store.json",
        {
            "version": 1,
            "num_frames": len(frames),
            "image_size": size,
            "fps": 10.0,
            "instructions": ["move"] * num_episodes,
            "sources": ["toy"] * num_episodes,
            "skipped": [],
        },
    )
    return folder


@pytest.fixture(scope="session")
def moving_discs(tmp_path_factory) -> Path:
    """A frame store of 12 episodes of 8 frames of 32 pixels."""
    return write_store(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture(scope="session")
def other_discs(tmp_path_factory) -> Path:
    """Another such store, of other episodes."""
    return write_store(tmp_path_factory.mktemp("data") / "others", num_episodes=10, seed=1)


@pytest.fixture(scope="session")
def equally_long_discs(tmp_path_factory) -> Path:
    """A store of other episodes, as many and as long as those of `moving_discs`."""
    return write_store(tmp_path_factory.mktemp("data") / "equally_long", seed=1)
