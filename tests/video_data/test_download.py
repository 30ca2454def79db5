"""URL rows from a server on this machine: what fails is tried again, and what stays missing is named."""

import http.server
import threading
from collections import Counter

import pytest

from lapa.schema import IngestConfig
from tests.video_data.encode import clip_bytes
from video_data.clips import ClipRequest
from video_data.sources import list_requests
from video_data.sources.download import fetch


@pytest.fixture
def server(tmp_path):
    """(address, requests by path): /good.mp4 answers, /flaky.mp4 after one failure, anything else never."""
    video, asked = clip_bytes(tmp_path), Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            if self.path.endswith(".m3u8"):
                self.send_response(200)
                self.send_header("Content-Type", "application/vnd.apple.mpegurl")
                self.end_headers()
                self.wfile.write(b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n/live.mp4\n")
            elif not self.path.endswith(".mp4") or "gone" in self.path:
                self.send_error(404)
            elif "flaky" in self.path and asked[self.path] == 1:
                self.send_error(503)
            else:
                self.send_response(200)
                self.send_header("Content-Type", "video/mp4")
                self.send_header("Content-Length", str(len(video)))
                self.end_headers()
                self.wfile.write(video)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def test_a_failed_download_is_tried_again_and_a_finished_one_is_not(server, tmp_path):
    address, asked = server
    urls = [f"{address}/{name}.mp4" for name in ("good", "flaky", "gone", "good")]
    fetched = fetch(urls, tmp_path / "downloads", attempts=2, num_workers=2, wait_s=0.01)
    assert fetched.keys() == set(urls)
    assert all(fetched[url].stat().st_size > 500 for url in urls[:2])
    assert "2 of 2 attempts" in fetched[urls[2]] and "404" in fetched[urls[2]]
    before = asked.copy()
    again = fetch(urls, tmp_path / "downloads", attempts=1, num_workers=1)
    assert {url: again[url] for url in urls[:2]} == {url: fetched[url] for url in urls[:2]}
    assert {path for path, count in asked.items() if count > before[path]} == {"/gone.mp4"}
    with pytest.raises(ValueError, match="attempts is 0"):
        fetch(urls, tmp_path / "downloads", attempts=0, num_workers=1)


def test_only_whole_videos_of_the_web_are_fetched(server, tmp_path):
    address, asked = server
    (tmp_path / "secret.mp4").write_bytes(b"of this machine")
    local, live = f"file://{tmp_path}/secret.mp4", f"{address}/live.m3u8"
    fetched = fetch([local, live], tmp_path / "downloads", attempts=2, num_workers=1, wait_s=0.01)
    assert "begins with 'file', expected http or https" in fetched[local]
    assert "a live stream" in fetched[live]
    assert not any((tmp_path / "downloads").iterdir()) and not asked["/live.mp4"]


def test_a_file_that_a_killed_run_left_is_no_finished_download(server, tmp_path):
    address, _ = server
    url = f"{address}/good.mp4"
    finished = fetch([url], tmp_path / "downloads", attempts=1, num_workers=1)[url]
    size = finished.stat().st_size
    finished.with_suffix(".json").unlink()
    finished.rename(finished.with_suffix(".mkv"))
    finished.with_suffix(".mkv").write_bytes(b"half")
    again = fetch([url], tmp_path / "downloads", attempts=1, num_workers=1)[url]
    assert again.stat().st_size == size and again.with_suffix(".json").is_file()


def test_rows_with_a_url_are_downloaded_once_a_video(server, tmp_path):
    address, asked = server
    (tmp_path / "clips.csv").write_text(
        "url,caption,start,end,licence\n"
        f"{address}/good.mp4,open,0,0.5,CC0\n"
        f"{address}/good.mp4,close,0.5,1.0,\n"
        f"{address}/gone.mp4,lost,,,\n"
    )

    def entries(**options):
        config = IngestConfig(path="", output_dir="", attempts=1, **options)
        return list(list_requests("auto", tmp_path / "clips.csv", config))

    first, second, lost = entries(download_dir=str(tmp_path / "downloads"))
    assert first.video == second.video and first.url == f"{address}/good.mp4"
    assert (first.start_s, first.end_s, first.licence) == (0.0, 0.5, "CC0")
    assert "404" in lost.reason and not isinstance(lost, ClipRequest)
    count = asked["/good.mp4"]
    entries(download_dir=str(tmp_path / "downloads"))
    assert asked["/good.mp4"] == count
    with pytest.raises(ValueError, match="set download_dir to download it"):
        entries()
