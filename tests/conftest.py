"""What every test relies on: no network, no files outside temporary folders, one thread."""

import os
import tempfile
from pathlib import Path

import pytest

# Set before torch, lerobot and datasets are imported: each reads its variables once.
_scratch = tempfile.TemporaryDirectory(prefix="lapa-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = f"{_scratch.name}/huggingface"
os.environ["HF_LEROBOT_HOME"] = f"{_scratch.name}/lerobot"
os.environ["LAPA_CACHE"] = f"{_scratch.name}/cache"
# Sums in a fixed order, and no threads that compete for the cores of a small machine.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real clips and robot data beside the checkout; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not part of the repository, and there is none at {folder}")
    return folder
