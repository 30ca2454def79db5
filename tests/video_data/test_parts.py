"""Part files are used again, and hold nothing of the clip before."""

from video_data import parts
from video_data.parts import create_part, release_part


def test_a_released_file_is_written_over(tmp_path):
    with create_part(tmp_path / "0-0.u8") as file:
        file.write(b"a long clip")
    written = (tmp_path / "0-0.u8").stat().st_ino
    release_part(tmp_path / "0-0.u8")
    with create_part(tmp_path / "1-0.u8") as file, create_part(tmp_path / "1-1.u8") as other:
        file.write(b"a clip")
        file.truncate()
        other.write(b"another")
    assert (tmp_path / "1-0.u8").stat().st_ino == written
    assert (tmp_path / "1-0.u8").read_bytes() == b"a clip"
    assert (tmp_path / "1-1.u8").read_bytes() == b"another"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-0.u8", "1-1.u8"]


def test_few_and_small_files_are_kept_spare(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MAX_SPARES", 2)
    monkeypatch.setattr(parts, "MAX_SPARE_BYTES", 8)
    for number, data in enumerate((b"as long as nine", b"a", b"b", b"c")):
        (tmp_path / f"{number}-0.u8").write_bytes(data)
        release_part(tmp_path / f"{number}-0.u8")
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"a", b"b"]
