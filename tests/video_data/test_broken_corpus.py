"""The whole stage on a folder of broken and odd files: nothing ends the run, and every file is accounted for."""

import json

import numpy as np
import pytest

from lapa.schema import ClipFilters, IngestConfig
from tests.video_data.broken_corpus import EITHER, GOOD, KEPT, write_corpus
from video_data.ingest import run


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """(what must become of a clip by id, the manifest's row by id, the store's folder)"""
    root, store = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("store")
    expected = write_corpus(root)
    filters = ClipFilters(min_frames=4)
    run(IngestConfig(path=str(root), output_dir=str(store), image_size=16, source_column="", filters=filters))
    rows = [json.loads(line) for line in (store / "manifest.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return expected, {row["id"]: row for row in rows}, store


def test_every_file_is_in_the_manifest_once_with_what_became_of_it(outcome):
    expected, rows, _ = outcome
    assert len(expected) > 150
    assert rows.keys() == expected.keys()
    wrong = []
    for path, must in expected.items():
        row = rows[path]
        kept = row["status"] == "kept"
        fits = kept if must == KEPT else not kept and must in row["reason"]
        if (must != EITHER and not fits) or (not kept and not row["reason"]):
            wrong.append((path, must, row["status"], row["reason"]))
    assert not wrong


def test_no_file_takes_a_worker_down(outcome):
    _, rows, _ = outcome
    assert not [path for path, row in rows.items() if "crashed" in (row["reason"] or "")]


def test_the_store_holds_the_frames_of_what_was_kept_and_nothing_else(outcome):
    _, rows, store = outcome
    meta = json.loads((store / "store.json").read_text())
    kept = [row for row in rows.values() if row["status"] == "kept"]
    assert sorted(meta["clips"]) == sorted(row["id"] for row in kept)
    assert meta["num_frames"] == sum(row["num_frames"] for row in kept)
    assert (store / "frames.u8").stat().st_size == meta["num_frames"] * 16 * 16 * 3
    assert all(row["num_frames"] >= 4 and 0 < row["fps"] < 1e4 for row in kept)


def test_a_good_file_is_whole_whatever_lies_beside_it(outcome):
    _, rows, store = outcome
    frames = np.fromfile(store / "frames.u8", np.uint8).reshape(-1, 16 * 16 * 3)
    for name in GOOD:
        assert rows[name]["num_frames"] == 12
    first = sum(
        rows[clip]["num_frames"] for clip in sorted(rows) if rows[clip]["status"] == "kept" and clip < "good.mp4"
    )
    assert (np.diff(frames[first : first + 12].mean(axis=1)) > 0).all()


def test_captions_that_are_no_text_are_counted_and_cost_no_clip(outcome):
    _, rows, _ = outcome
    found = {path.split("/")[1]: row["caption_origin"] for path, row in rows.items() if path.startswith("caption/")}
    unreadable = {f"{name}.mp4" for name in ("latin", "half-utf16", "binary", "no-json", "list", "deep")}
    assert found == dict.fromkeys(unreadable, "unreadable") | {"null.mp4": "none", "folder.mp4": "none"}
