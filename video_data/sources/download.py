"""URLs to files with yt-dlp: what failed is tried again, what is there is kept, and a failure costs one URL."""

import hashlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

# Latent actions need no sound, and one stream needs no program that joins two. Sites name their formats in many
# ways, so a file with sound is the last resort.
FORMAT = "bestvideo[ext=mp4]/best[ext=mp4]/bestvideo/best"
LIVE = "a live stream, which has no end"
UNFINISHED = (".part", ".ytdl", ".temp", ".json")


def fetch(
    urls: Iterable[str], folder: Path, attempts: int, num_workers: int, wait_s: float = 1.0
) -> dict[str, Path | str]:
    """Download every URL into `folder`: {url: its file, or the reason why there is none}.

    A file is named after its URL's digest, with `<name>.json` beside it (url, title, licence), so a second call
    downloads only what is missing. A URL that fails is tried `attempts` times, after wait_s, 2 wait_s, 4 wait_s...
    Raises ValueError for wrong options and without yt-dlp.
    """
    if attempts < 1:
        raise ValueError(f"attempts is {attempts}, expected at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    # The .json is written last: a file without one may be what a killed run left.
    there = {
        file.stem: file
        for file in folder.iterdir()
        if not file.name.endswith(UNFINISHED) and file.with_suffix(".json").is_file()
    }
    wanted = list(dict.fromkeys(urls))
    fetched: dict[str, Path | str] = {url: there[name] for url in wanted if (name := _name(url)) in there}
    missing = [url for url in wanted if url not in fetched]
    if not missing:
        return fetched
    try:
        import yt_dlp  # noqa: F401
    except ImportError:
        raise ValueError("downloads need the package yt-dlp: pip install 'lerobot_policy_lapa[video]'") from None
    with (
        ThreadPoolExecutor(num_workers) as pool,
        tqdm(total=len(wanted), initial=len(fetched), desc="download", unit="video", mininterval=1.0) as progress,
    ):
        results = pool.map(lambda url: _fetch_one(url, folder, attempts, wait_s), missing)
        for url, result in zip(missing, results, strict=True):
            fetched[url] = result
            progress.update()
    return fetched


def _name(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:20]


def _refuse_live(information: dict, *, incomplete: bool = False) -> str | None:
    """yt-dlp's match_filter: why not to download, or None."""
    return LIVE if information.get("is_live") or information.get("live_status") == "is_live" else None


def _fetch_one(url: str, folder: Path, attempts: int, wait_s: float) -> Path | str:
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        # A table must not make yt-dlp read local files or run searches.
        return f"not downloaded: its URL begins with {scheme[:40]!r}, expected http or https"
    import yt_dlp

    name = _name(url)
    options = {
        "outtmpl": str(folder / f"{name}.%(ext)s"),
        "format": FORMAT,
        "quiet": True,
        "no_warnings": True,
        "noprogress": True,
        "noplaylist": True,
        "playlist_items": "1",
        "match_filter": _refuse_live,
        "retries": 0,
        "extractor_retries": 0,
        "logger": _Silent(),
    }
    reason = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(wait_s * 2 ** (attempt - 1))
        try:
            with yt_dlp.YoutubeDL(options) as client:
                information = client.extract_info(url)
                # A page may be told as a list of its videos.
                if "entries" in information:
                    information = next(iter(information["entries"]))
                if refused := _refuse_live(information):
                    return f"not downloaded: {refused}"
                file = Path(information["requested_downloads"][0]["filepath"])
        # A site can answer with anything, and extractors fail on it in their own ways.
        except Exception as error:
            reason = f"download failed, {attempt + 1} of {attempts} attempts: {error}"
            continue
        origin = {"url": url, "title": information.get("title"), "licence": information.get("license")}
        unfinished = folder / f"{name}.json.part"
        unfinished.write_text(json.dumps(origin), encoding="utf-8")
        unfinished.replace(folder / f"{name}.json")
        return file
    return reason


class _Silent:
    """yt-dlp prints every failure; here they are counted instead."""

    def debug(self, message: str) -> None: ...
    def warning(self, message: str) -> None: ...
    def error(self, message: str) -> None: ...


def licence_of(file: Path) -> str:
    """The licence that the site stated for a downloaded file; empty where it stated none."""
    origin = file.with_suffix(".json")
    return json.loads(origin.read_text(encoding="utf-8")).get("licence") or "" if origin.is_file() else ""
