"""`lapa ingest` with a realigner: what it writes is in the store and the manifest, and says where it comes from."""

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from lapa import application
from lapa.data import read_store
from tests.video_data.encode import write_clip
from video_data.captions.realigner import ORIGIN, Realigner, RealignerOptions, Vocabulary

TITLES = ["touch the red cube by Vokati", "the blue star!!", "go to the moon"]


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setattr(
        "video_data.ingest.run_in_order", lambda _, function, calls, __: (function(*call) for call in calls)
    )


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder as `lapa train_realigner` writes it, of a model with random weights."""
    torch.manual_seed(0)
    options = RealignerOptions(
        image_size=16,
        num_frames=2,
        encoder_width=8,
        num_visual_tokens=2,
        num_prefix_tokens=2,
        width=16,
        num_heads=2,
        num_mapper_layers=1,
        num_layers=1,
        max_title_words=8,
        max_caption_words=6,
    )
    words = Vocabulary.of(["reach the red blue cube star moon"], 1).words
    folder = tmp_path / "realigned"
    folder.mkdir()
    save_file(Realigner(options, len(Vocabulary(words))).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"realigner": asdict(options), "words": words, "sees_frames": True}))
    return folder


def ingest(videos: Path, output: Path, *options: str) -> list[dict]:
    application.launch(
        "ingest", [f"path={videos}", f"output_dir={output}", "image_size=16", "filters.min_frames=4", *options]
    )
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]


def test_realigned_captions_land_in_store_and_manifest_with_their_origin(tmp_path, model):
    videos = tmp_path / "videos"
    for number, title in enumerate(TITLES):
        write_clip(videos / f"{number}.mp4", seed=number)
        (videos / f"{number}.txt").write_text(title)
    raw = ingest(videos, tmp_path / "raw")
    realigned = ingest(
        videos,
        tmp_path / "store",
        "captioner.name=realigner",
        f"captioner.model={model}",
        "captioner.only_missing=false",
        "captioner.device=cpu",
    )
    assert [row["caption"] for row in raw] == TITLES
    assert [row["caption_origin"] for row in raw] == ["sidecar"] * 3
    captions = [row["caption"] for row in realigned]
    assert any(captions), "random weights that write nothing tell nothing: take another seed"
    assert all(caption not in TITLES for caption in captions)
    assert [row["caption_origin"] for row in realigned] == [ORIGIN if caption else "none" for caption in captions]
    table = pq.read_table(tmp_path / "store" / "manifest.parquet").to_pydict()
    assert table["caption"] == captions
    assert table["caption_origin"] == [row["caption_origin"] for row in realigned]
    assert read_store(tmp_path / "store").instructions == captions
    # All but the captions is what it is without a realigner.
    assert (tmp_path / "store" / "frames.u8").read_bytes() == (tmp_path / "raw" / "frames.u8").read_bytes()
    unchanged = [{**row, "caption": "", "caption_origin": ""} for row in raw]
    assert [{**row, "caption": "", "caption_origin": ""} for row in realigned] == unchanged
