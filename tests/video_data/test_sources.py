"""Every layout lists its clips and opens each of them; what is wrong is named with what was looked for."""

import contextlib
import json
import os
import shutil
from dataclasses import asdict

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from lapa.schema import IngestConfig
from tests.video_data import layouts
from tests.video_data.encode import clip_bytes, write_clip
from video_data.clips import ClipRequest, Rejected
from video_data.sources import LAYOUTS, detect_layout, list_requests, open_media
from video_data.sources.documents import iterate_object
from video_data.sources.lerobot import read_actions
from video_data.sources.rows import seconds


def listed(root, layout="auto", **changes) -> tuple[list[ClipRequest], dict[str, str]]:
    """The requests, and {id: reason} of what was rejected."""
    options = IngestConfig(path=str(root), output_dir="", source_column="", **changes)
    entries = list(list_requests(layout, root, options))
    assert len({entry.id for entry in entries}) == len(entries)
    requests = [entry for entry in entries if isinstance(entry, ClipRequest)]
    return requests, {entry.id: entry.reason for entry in entries if isinstance(entry, Rejected)}


def num_decoded(request: ClipRequest, root) -> int:
    """Frames of the request's span, decoded from its media as PyAV opens it."""
    media = open_media(request, root)
    if isinstance(media, list):
        for item in media:
            with av.open(item if hasattr(item, "read") else str(item)) as container:
                next(container.decode(video=0))
        return len(media)
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(media) if hasattr(media, "read") else str(media)
        container = opened.enter_context(av.open(file))
        times = [frame.time for frame in container.decode(video=0)]
    half_frame_s = (times[1] - times[0]) / 2
    start_s = -np.inf if request.start_s is None else request.start_s - half_frame_s
    end_s = np.inf if request.end_s is None else request.end_s - half_frame_s
    return sum(start_s <= time < end_s for time in times)


@pytest.mark.parametrize(("layout", "path", "build"), layouts.BUILDERS, ids=[b.__name__ for *_, b in layouts.BUILDERS])
def test_a_layout_is_recognised_and_every_clip_of_it_opens(tmp_path, layout, path, build):
    root = tmp_path / path
    expected = build(root)
    assert detect_layout(root) == layout
    requests, rejected = listed(root, licence="CC-BY-4.0")
    found = {r.id: (r.caption, r.caption_origin, r.source, r.split, num_decoded(r, root)) for r in requests}
    assert found == expected
    assert list(found) == list(expected)
    assert all(request.licence for request in requests)
    assert rejected.keys() <= {"uid-1:4.000-8.000"}


def test_every_layout_is_tested():
    assert {layout for layout, *_ in layouts.BUILDERS} == LAYOUTS.keys()


def test_a_licence_that_the_data_set_states_is_kept(tmp_path):
    layouts.webdataset(tmp_path / "tars")
    requests, _ = listed(tmp_path / "tars", licence="CC-BY-4.0")
    assert [request.licence for request in requests] == ["CC-BY-4.0", "CC0", "CC-BY-4.0"]


def test_a_row_that_cannot_be_requested_costs_only_itself(tmp_path):
    layouts.table(tmp_path / "clips.csv")
    with (tmp_path / "clips.csv").open("a") as table:
        table.write("videos/a.mp4,again,,,whole,,,\n")
        table.write("videos/b.mp4,lost,,,lost,,,\n")
        table.write("videos/a.mp4,backwards,2,1,backwards,,,\n")
        table.write("videos/a.mp4,unclear,soon,,unclear,,,\n")
        table.write(",nothing,,,nothing,,,\n")
        table.write("x" * 5000 + ".mp4,long,,,long,,,\n")
    requests, rejected = listed(tmp_path / "clips.csv")
    assert [request.id for request in requests] == ["whole", "videos/a.mp4:0.3-0.8"]
    assert "listed before" in rejected["whole (row 3)"]
    assert f"no file {tmp_path}/videos/b.mp4" in rejected["lost"]
    assert "ends at 1 s and starts at 2 s" in rejected["backwards"]
    assert "'soon' is neither seconds nor" in rejected["unclear"]
    assert "neither a path nor a URL" in rejected["nothing"]
    assert "no file" in rejected["long"]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [("12.5", 12.5), ("01:02", 62.0), ("1:00:00.25", 3600.25), (7, 7.0), ("", None), (None, None), (np.nan, None)],
)
def test_times_are_seconds_or_clock_times(stated, expected):
    assert seconds(stated) == expected


@pytest.mark.parametrize("stated", ["-1", "inf", "1:2:3:4", "1h", "0:-5"])
def test_other_times_are_errors(stated):
    with pytest.raises(ValueError, match="the time"):
        seconds(stated)


def test_a_caption_that_is_no_text_leaves_the_clip_without_one(tmp_path):
    write_clip(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    write_clip(tmp_path / "b.mp4")
    (tmp_path / "b.json").write_text("[1, 2")
    write_clip(tmp_path / "c.mp4")
    (tmp_path / "c.txt").write_bytes("hübsch".encode("utf-16"))
    requests, rejected = listed(tmp_path)
    assert [(r.caption, r.caption_origin) for r in requests] == [
        ("", "unreadable"),
        ("", "unreadable"),
        ("hübsch", "sidecar"),
    ]
    assert not rejected


def test_a_folder_names_what_is_no_video_file(tmp_path):
    write_clip(tmp_path / "a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "up").symlink_to("..", target_is_directory=True)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / os.fsdecode(b"latin-\xe9.mp4")).write_bytes(b"x")
    requests, rejected = listed(tmp_path)
    assert [request.id for request in requests] == ["a.mp4"]
    assert rejected == {
        "deep/up": "a link to a folder that it lies in",
        "folder.mp4": "a folder, not a file",
        "latin-\\udce9.mp4": "its name is not UTF-8: rename it",
        "loop.mp4": "a link that leads to no file",
        "pipe.mp4": "neither a file nor a folder",
    }


def test_what_is_no_unicode_never_reaches_the_manifest(tmp_path):
    video = clip_bytes(tmp_path)
    stated = {"caption": "a \ud800 b", "source": "lab \udfff", "license": "\ud83d\ude00"}
    members = {"a.mp4": video, "a.json": json.dumps(stated).encode(), "b\udce9.mp4": video}
    layouts.write_tar(tmp_path / "tars" / "0.tar", members)
    requests, rejected = listed(tmp_path / "tars")
    for text in [value for r in requests for value in asdict(r).values() if isinstance(value, str)] + [*rejected]:
        text.encode()
    assert requests[0].licence == "\U0001f600" and "�" in requests[0].caption
    assert rejected == {"0.tar/b\\udce9": "its name is not UTF-8: rename it"}


def test_linked_folders_are_followed_and_paths_are_in_order(tmp_path):
    write_clip(tmp_path / "elsewhere" / "a.mp4")
    root = tmp_path / "root"
    for name in ("b/1.mp4", "b.mp4", "b-1.mp4", "a/z/2.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "elsewhere" / "a.mp4", root / name)
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    requests, _ = listed(root)
    ids = [request.id for request in requests]
    assert ids == sorted(ids) == ["a/z/2.mp4", "b-1.mp4", "b.mp4", "b/1.mp4", "linked/a.mp4"]


def test_a_tar_that_is_cut_off_costs_only_what_is_cut(tmp_path):
    layouts.webdataset(tmp_path / "tars")
    whole = tmp_path / "tars" / "00000.tar"
    data = whole.read_bytes()
    video = clip_bytes(tmp_path)
    cut_at = data.index(video, data.index(video) + 1) + len(video) // 2
    (tmp_path / "tars" / "00001.tar").write_bytes(data[:cut_at])
    (tmp_path / "tars" / "00002.tar").write_bytes(b"")
    (tmp_path / "tars" / "00003.tar").write_bytes(b"no tar" * 500)
    requests, rejected = listed(tmp_path / "tars")
    assert [r.id for r in requests] == ["00000.tar/a", "00000.tar/b", "00000.tar/c/d", "00001.tar/a"]
    assert "cut off" in rejected["00001.tar/b.mp4"]
    assert all("cannot be read" in rejected[f"0000{i}.tar"] for i in (2, 3))
    assert all(num_decoded(request, tmp_path / "tars") == 12 for request in requests)


def test_a_damaged_record_costs_one_episode_and_a_damaged_length_the_rest_of_its_shard(tmp_path):
    root = tmp_path / "rlds"
    layouts.rlds(root)
    shard = root / "bridge-train.tfrecord-00000-of-00002"
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"\xff\xd8\xff") + 200] ^= 1
    shard.write_bytes(damaged)
    requests, _ = listed(root)
    with pytest.raises(ValueError, match="checksum does not match"):
        open_media(requests[0], root)
    assert num_decoded(requests[1], root) == 4

    shard.write_bytes(whole[:-5])
    requests, rejected = listed(root)
    assert [request.id for request in requests] == [f"{shard.name}:0", "bridge-val.tfrecord-00001-of-00002:0"]
    assert "cut off" in rejected[f"{shard.name}:1"]

    shard.write_bytes(b"\x00" * 50)
    assert "checksum of its length" in listed(root)[1][f"{shard.name}:0"]
    shard.write_bytes(layouts.record(b"no example at all"))
    assert "no tf.train.Example" in listed(root)[1][f"{shard.name}:0"]
    shard.write_bytes(layouts.record(layouts.example({"steps/action": [1.0]})))
    assert "its features are ['steps/action']" in listed(root)[1][f"{shard.name}:0"]


def test_actions_are_kept_or_dropped(tmp_path):
    for build in (layouts.lerobot_v2, layouts.lerobot_v3):
        root = tmp_path / build.__name__
        build(root)
        dropped, _ = listed(root)
        with pytest.raises(ValueError, match="keep_actions=true"):
            read_actions(root, dropped[1].episode)
        kept, _ = listed(root, keep_actions=True)
        rows = read_actions(root, kept[1].episode)
        assert rows["action"].tolist() == [[1, t] for t in range(7)]
        assert rows["state"].shape == (7, 3) and rows["state"].dtype == np.float32


def test_a_camera_is_chosen_by_name(tmp_path):
    layouts.lerobot_v3(tmp_path / "robot")
    layouts.rlds(tmp_path / "rlds")
    assert "observation.images.wrist" in listed(tmp_path / "robot", camera="wrist")[0][0].video
    assert listed(tmp_path / "rlds")[0][0].episode == {"camera": "steps/observation/image"}
    assert listed(tmp_path / "rlds", camera="wrist_image")[0][0].episode == {"camera": "steps/observation/wrist_image"}
    with pytest.raises(ValueError, match=r"camera is 'front', the video features .*top.*wrist"):
        listed(tmp_path / "robot", camera="front")


@pytest.mark.parametrize("depth", ["named", "flagged"])
def test_a_depth_image_is_no_default_camera(tmp_path, depth):
    layouts.lerobot_v3(tmp_path / "robot")
    info = json.loads((tmp_path / "robot" / "meta" / "info.json").read_text())
    first = "observation.images.depth" if depth == "named" else "observation.images.top"
    info["features"][first] = {"dtype": "video"} | (
        {"info": {"video.is_depth_map": True}} if depth == "flagged" else {}
    )
    if depth == "named":
        info["features"].pop("observation.images.top")
    (tmp_path / "robot" / "meta" / "info.json").write_text(json.dumps(info))
    assert "observation.images.wrist" in listed(tmp_path / "robot")[0][0].video


def test_the_window_around_a_narration_is_an_option(tmp_path):
    layouts.ego4d(tmp_path)
    requests, rejected = listed(tmp_path, window_s=1.0)
    assert [(r.start_s, r.end_s) for r in requests] == [(0.0, 1.0), (3.5, 4.5), (3.5, 4.5)]
    assert "#unsure" in rejected["uid-1:5.500-6.500"]
    with pytest.raises(ValueError, match="window_s is 0"):
        listed(tmp_path, window_s=0.0)


def rename(root, old, new):
    (root / old).rename(root / new)


def replace(root, file, old, new):
    (root / file).write_text((root / file).read_text().replace(old, new))


# What is wrong in the wild: (builder, how it is wrong, what the error must name).
MISTAKES = [
    (layouts.lerobot_v2, lambda root: rename(root, "videos", "video"), r"no file .*/videos/.*mp4.*holds .*video/"),
    (layouts.lerobot_v3, lambda root: rename(root, "videos", "video"), r"no file .*/videos/.*mp4.*holds .*video/"),
    (layouts.lerobot_v3, lambda root: replace(root, "meta/info.json", "v3.0", "v1.6"), r"version v1.6, expected v3.0"),
    (
        layouts.lerobot_v3,
        lambda root: replace(root, "meta/info.json", '"video"', '"image"'),
        r"no video feature: \['o",
    ),
    (layouts.lerobot_v3, lambda root: replace(root, "meta/info.json", "{", ""), r"info\.json is not JSON"),
    (
        layouts.lerobot_v3,
        lambda root: replace(root, "meta/info.json", '"action"', '"actions"'),
        r"no feature 'action': its features are \['actions', 'obs",
    ),
    (layouts.lerobot_v3, lambda root: replace(root, "meta/info.json", "video_path", "videos"), r"no key 'video_path'"),
    (layouts.lerobot_v2, lambda root: replace(root, "meta/episodes.jsonl", "length", "len"), r"lacks a key.*'length'"),
    (layouts.something_something_v2, lambda root: replace(root, "labels/train.json", "id", "i"), r"the key 'id', and"),
    (layouts.ego4d, lambda root: replace(root, "v2/annotations/narration.json", "{", "[{"), r"narration.json is not"),
    (layouts.lerobot_v2, lambda root: rename(root, "meta/episodes.jsonl", "meta/e.jsonl"), r"no file .*episodes.jsonl"),
    (layouts.something_something_v2, lambda root: rename(root, "labels", "annotations"), r"no train.json .* holds"),
    (
        layouts.something_something_v2,
        lambda root: rename(root, "20bn-something-something-v2", "videos"),
        r"no file .*20bn-something-something-v2/7.webm; .* holds labels/, videos/",
    ),
    (layouts.ego4d, lambda root: rename(root, "v2/full_scale", "v2/videos"), r"no file uid-1.mp4 in .*holds .*videos/"),
    (
        layouts.epic_kitchens_100,
        lambda root: replace(root, "epic-kitchens-100-annotations/EPIC_100_train.csv", "narration_id", "id"),
        r"no column 'narration_id': its columns are \['id'",
    ),
    (
        layouts.epic_kitchens_100,
        lambda root: rename(root, "EPIC-KITCHENS/P01/videos", "EPIC-KITCHENS/P01/video"),
        r"no file .*P01/videos/P01_01.MP4; .*P01 holds video/",
    ),
    (layouts.howto100m, lambda root: rename(root, "caption.json", "captions.json"), r"no caption.json or raw_caption"),
    (layouts.howto100m, lambda root: rename(root, "videos", "video"), r"no file .*videos/abc.mp4: set download_dir"),
    (
        layouts.webvid,
        lambda root: replace(root, "results_2M_train.csv", "page_dir", "page"),
        r"train.csv has no column 'page_dir': its columns are",
    ),
    (layouts.webvid, lambda root: rename(root, "videos", "video"), r"no file .*videos/001_050/21.mp4.*holds .*video/"),
    (
        layouts.panda70m,
        lambda root: replace(root, "panda70m_training_2m.csv", "timestamp", "timestamps"),
        r"no column 'timestamp': its columns are \['videoID', 'url', 'timestamps'",
    ),
    (layouts.egocentric10k, lambda root: rename(root, "factory_001", "site_001"), r"no factory_.*it holds \['site_001"),
    (layouts.laq_jpeg, lambda root: [shutil.rmtree(f) for f in root.glob("clip_?")], r"expected a folder of numbered"),
    (layouts.webdataset, lambda root: rename(root, "00000.tar", "00000.tar.gz"), r"no \*.tar in .*must be unpacked"),
    (layouts.rlds, lambda root: [f.unlink() for f in root.glob("*.tfrecord*")], r"no \*.tfrecord.*features.json"),
]


@pytest.mark.parametrize(("build", "mistake", "message"), MISTAKES)
def test_a_wrong_key_is_named_with_what_is_there(tmp_path, build, mistake, message):
    layout, path, _ = next(entry for entry in layouts.BUILDERS if entry[2] is build)
    build(tmp_path / path)
    mistake(tmp_path / path)
    with pytest.raises(ValueError, match=message):
        listed(tmp_path / path, layout, keep_actions=True)


def test_columns_of_a_table_are_checked(tmp_path):
    layouts.table(tmp_path / "clips.csv")
    replace(tmp_path, "clips.csv", "caption", "captions")
    with pytest.raises(ValueError, match=r"has a column 'captions' and no 'caption'"):
        listed(tmp_path / "clips.csv")
    replace(tmp_path, "clips.csv", "path", "file")
    with pytest.raises(ValueError, match=r"neither a column 'path' nor 'url': its columns are \['file', 'captions'"):
        listed(tmp_path / "clips.csv", "table")
    (tmp_path / "clips.csv").write_bytes(b"path,caption\n\xff\xfe\x00,a\n")
    with pytest.raises(ValueError, match="not a CSV file in UTF-8"):
        listed(tmp_path / "clips.csv", "table")
    (tmp_path / "clips.parquet").write_text("path,caption\n")
    with pytest.raises(ValueError, match="not a parquet file"):
        listed(tmp_path / "clips.parquet", "table")


def test_a_column_that_v3_needs_is_named(tmp_path):
    layouts.lerobot_v3(tmp_path)
    file = tmp_path / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["data/file_index"]), file)
    with pytest.raises(ValueError, match=r"no column 'data/file_index': it has \['episode_index', 'tasks'"):
        listed(tmp_path)


def test_a_layout_is_not_guessed_where_two_fit(tmp_path):
    layouts.ego4d(tmp_path)
    layouts.epic_kitchens_100(tmp_path)
    with pytest.raises(ValueError, match="may be ego4d or epic_kitchens_100: set layout"):
        detect_layout(tmp_path)
    with pytest.raises(ValueError, match="layout is 'kinetics', expected auto or one of folder, table"):
        listed(tmp_path, "kinetics")


def test_a_large_object_is_read_one_pair_at_a_time(tmp_path, monkeypatch):
    document = {f"video {i}": {"text": ["} , {", 'a "quote"', "é"] * i, "n": [i, -1.5e3, None]} for i in range(40)}
    path = tmp_path / "caption.json"
    for indent, block in ((None, 7), (2, 64), (None, 1 << 20)):
        monkeypatch.setattr("video_data.sources.documents.BLOCK", block)
        path.write_text(json.dumps(document, indent=indent))
        assert dict(iterate_object(path)) == document
    path.write_text("{}")
    assert dict(iterate_object(path)) == {}
    for broken in ('{"a": [1, 2', '{"a": 1', "[1]", "", '{"a" 1}'):
        path.write_text(broken)
        with pytest.raises(ValueError, match="JSON object"):
            dict(iterate_object(path))


def test_episodes_of_a_real_robot_are_listed_with_their_actions(shared_data):
    root = shared_data / "robot" / "g1_bottle_v21"
    requests, rejected = listed(root, keep_actions=True)
    assert len(requests) == 8 and not rejected
    assert {request.caption for request in requests} == {"Pick up the yellow bottle on the table."}
    episode = requests[0].episode
    assert read_actions(root, episode)["action"].shape == (episode["num_frames"], 26)
    assert num_decoded(requests[0], root) == episode["num_frames"]
