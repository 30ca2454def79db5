"""Two processes give what one gives with the same batch. They run once, by `torchrun`, for all tests here."""

import contextlib
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lapa import distributed
from lapa.quantizer.codebooks.base import build_codebook
from lapa.runtime import setup
from lapa.schema import (
    Codebook,
    ConvolutionalQuantizer,
    FSQCodebook,
    LFQCodebook,
    NSVQCodebook,
    PairData,
    ResidualCodebook,
    Runtime,
    Training,
    TrainQuantizerConfig,
    VQCodebook,
)
from lapa.stage import run_stage
from lapa.trainer import fit, read_log

NUM_STEPS, BATCH_SIZE = 24, 8
CPU = Runtime(device="cpu", dtype="float32", num_threads=1)
CODEBOOKS = {
    "fsq": FSQCodebook(code_length=2, codebook_size=8),
    "nsvq": NSVQCodebook(code_length=2, codebook_size=8, replace_every_steps=5),
    "vq": VQCodebook(code_length=2, codebook_size=16),
    "residual": ResidualCodebook(code_length=2, codebook_size=4),
    "lfq": LFQCodebook(code_length=2, codebook_size=8),
}


def train_autoencoder(codebook_config: Codebook, folder: Path, killed_at: int | None = None) -> dict[str, Tensor]:
    """An autoencoder of random points, through a codebook, by a loss that is a ratio of means."""
    num_batches = 0
    torch.manual_seed(distributed.rank())  # `fit` gives all processes the first one's weights
    encoder, codebook, decoder = nn.Linear(6, 16), build_codebook(codebook_config, 8), nn.Linear(16, 6)
    model = nn.ModuleDict({"encoder": encoder, "codebook": codebook, "decoder": decoder})

    def make_batch(generator: np.random.Generator) -> Tensor:
        nonlocal num_batches
        num_batches += 1
        if num_batches == killed_at:
            raise KeyboardInterrupt
        points = generator.normal(size=(BATCH_SIZE, 6))[distributed.shard(BATCH_SIZE)]
        return torch.from_numpy(points.astype(np.float32))

    def loss_function(points: Tensor):
        quantised, _, loss = codebook(encoder(points).view(-1, 2, 8))
        error = (decoder(quantised.flatten(1)) - points).square().mean()
        return error / distributed.mean(points.square().mean()) + loss, {"error": error.detach()}

    training = Training(
        num_steps=NUM_STEPS,
        batch_size=BATCH_SIZE,
        log_every_steps=1,
        checkpoint_every_steps=5,
        grad_clip=0.5,
        ema_decay=0.9,
        tensorboard=False,
    )
    fit(model, make_batch, loss_function, training, setup(CPU), folder)
    return codebook.state_dict()


def stage_config(store: Path, output_dir: Path) -> TrainQuantizerConfig:
    return TrainQuantizerConfig(
        output_dir=str(output_dir),
        data=PairData(path=str(store), frame_gap_frames=2),
        model=ConvolutionalQuantizer(image_size=32, width=8, latent_dim=8, num_keypoints=4),
        codebook=FSQCodebook(code_length=2, codebook_size=4),
        num_eval_pairs=16,
        training=Training(num_steps=6, batch_size=BATCH_SIZE, log_every_steps=1, tensorboard=False),
        runtime=CPU,
    )


def digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()


def work(folder: Path) -> None:
    """What each of the two processes does; each leaves a JSON file with what it saw."""
    distributed.start()
    seen: dict = {"rank": distributed.rank(), "processes": distributed.world_size()}
    for name, config in CODEBOOKS.items():
        seen[name] = digest(train_autoencoder(config, folder / name))
    with contextlib.suppress(KeyboardInterrupt):
        train_autoencoder(CODEBOOKS["nsvq"], folder / "killed", killed_at=13)
    seen["resumed"] = digest(train_autoencoder(CODEBOOKS["nsvq"], folder / "killed"))
    seen["results"] = run_stage("train_quantizer", stage_config(folder / "store", folder / "stage"))
    seen["again"] = run_stage("train_quantizer", stage_config(folder / "store", folder / "stage"))
    try:
        distributed.shard(BATCH_SIZE + 1)
    except ValueError as error:
        seen["refusal"] = str(error)
    (folder / f"seen{distributed.rank()}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """The folder in which two processes have done their work."""
    from tests.lapa.quantizer.conftest import write_store  # can be found under pytest, but not by the processes

    folder = tmp_path_factory.mktemp("together")
    write_store(folder / "store")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, __file__, str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def seen(together) -> list[dict]:
    return [json.loads((together / f"seen{rank}.json").read_text()) for rank in range(2)]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_log(folder / "log.jsonl")]


@pytest.mark.parametrize("name", list(CODEBOOKS))
def test_both_processes_end_with_the_same_codebook(seen, name):
    assert seen[0][name] == seen[1][name]


@pytest.mark.parametrize("name", list(CODEBOOKS))
def test_the_loss_is_that_of_one_process_with_the_whole_batch(together, tmp_path, name):
    train_autoencoder(CODEBOOKS[name], tmp_path)
    alone = losses(tmp_path)
    assert len(alone) == NUM_STEPS and alone[-1] != alone[0]
    assert losses(together / name) == pytest.approx(alone, abs=1e-4)


def test_a_killed_run_goes_on_in_both_processes_to_the_same_codebook(seen):
    assert seen[0]["resumed"] == seen[1]["resumed"] == seen[0]["nsvq"]


def test_a_stage_is_run_by_both_and_written_by_the_first(together, seen, tmp_path):
    assert [(one["rank"], one["processes"]) for one in seen] == [(0, 2), (1, 2)]
    assert seen[0]["results"] == seen[1]["results"] == seen[0]["again"] == seen[1]["again"]
    record = json.loads((together / "stage" / "stage.json").read_text())
    assert record["status"] == "complete" and record["results"] == seen[0]["results"]
    run_stage("train_quantizer", stage_config(together / "store", tmp_path / "alone"))
    assert losses(together / "stage") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


def test_a_batch_that_does_not_divide_evenly_is_refused(seen):
    for one in seen:
        assert "training.batch_size is 9 for 2 processes: expected a multiple of 2" in one["refusal"]


def test_one_process_gets_back_what_it_gave():
    rows, generator = torch.randn(4, 2), np.random.default_rng(0)
    assert distributed.gather_rows(rows) is rows and distributed.own_generator(generator) is generator
    assert distributed.shard(5) == slice(0, 5) and distributed.is_main()
    assert distributed.share({"loss": 1.0}) == {"loss": 1.0}
    assert torch.equal(distributed.mean(rows), rows)


if __name__ == "__main__":  # one of the two processes
    work(Path(sys.argv[1]))
