"""The whole stage on media that are no plain files: spans of a shared video, tar members, images, records."""

import json

import pytest

from lapa.data import read_store
from lapa.schema import ClipFilters, IngestConfig
from tests.video_data import layouts
from video_data.ingest import run


@pytest.mark.parametrize("build", [layouts.lerobot_v3, layouts.webdataset, layouts.laq_jpeg, layouts.rlds])
def test_every_clip_is_stored_with_all_of_its_frames_and_its_caption(tmp_path, build):
    root, store = tmp_path / "root", tmp_path / "store"
    expected = build(root)
    options = {"image_size": 16, "num_workers": 1, "source_column": "", "filters": ClipFilters(min_frames=1)}
    with_actions = build is layouts.lerobot_v3
    run(IngestConfig(path=str(root), output_dir=str(store), keep_actions=with_actions, **options))

    rows = [json.loads(line) for line in (store / "manifest.jsonl").read_text().splitlines()]
    columns = ("caption", "caption_origin", "source", "split", "num_frames")
    assert {row["id"]: tuple(row[column] for column in columns) for row in rows} == expected
    frames = read_store(store)
    assert frames.num_frames == sum(num_frames for *_, num_frames in expected.values())
    if with_actions:
        assert frames.actions.tolist() == [[e, t] for e, length in enumerate(layouts.LENGTHS) for t in range(length)]
