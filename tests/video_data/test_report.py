"""The page that an ingest leaves: what it says and shows is what is in the manifest."""

import json
import re

from lapa.schema import ClipFilters, IngestConfig
from tests.video_data.encode import write_clip
from video_data.ingest import run


def test_the_report_counts_shows_and_escapes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "video_data.ingest.run_in_order", lambda _, function, calls, __: (function(*call) for call in calls)
    )
    videos, output = tmp_path / "videos", tmp_path / "store"
    for index in range(5):
        write_clip(videos / f"{index}.mp4", seed=index)
    write_clip(videos / "again.mp4", seed=2)
    write_clip(videos / "short.mp4", num_frames=3)
    (videos / "broken.mp4").write_text("not a video")
    rows = "".join(f"{index}.mp4,pick <b>{index}</b> & place,north\n" for index in range(5))
    (videos / "clips.csv").write_text("path,caption,lab\n" + rows)
    cfg = IngestConfig(
        path=str(videos),
        output_dir=str(output),
        image_size=32,
        licence="CC-BY-4.0",
        duplicates="reject",
        filters=ClipFilters(min_frames=4),
    )
    run(cfg)
    page = (output / "report.html").read_text()

    assert "5 of 8 clips kept" in page
    for name, count in (("kept", 5), ("decode", 1), ("length", 1), ("duplicates", 1), ("CC-BY-4.0", 5), ("north", 5)):
        assert f"<td>{name}</td><td class=number>{count}</td>" in page
    assert "too short: 3 frames, min_frames is 4" in page
    # Five kept clips, one pair, and the rejected clip that has frames; captions are text, never markup.
    assert len(re.findall(r'src="data:image/jpeg;base64,[A-Za-z0-9+/=]{300,}"', page)) == 5 + 2 + 1
    assert "<b>" not in page and "&lt;b&gt;" in page
    # Nothing is fetched from anywhere.
    assert not re.search(r'(src|href)="(?!data:)', page)
    manifest = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert sum(row["status"] == "kept" for row in manifest) == 5
