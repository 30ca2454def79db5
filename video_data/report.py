"""report.html of an ingest: one self-contained page that answers what was kept, what was not, and why.

Counts by filter, contact sheets of kept and of rejected clips, the histogram of motion, near duplicates side by
side, licences, captions and sources.
"""

import base64
import html
import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from video_data.duplicates import shown_positions
from video_data.pictures import strip_jpeg
from video_data.store import read_manifest, write_text

NUM_KEPT_SHOWN = 24
NUM_REJECTED_LISTED = 60
NUM_PAIRS_SHOWN = 20
NUM_BINS = 40
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0 }
td { overflow-wrap: anywhere }
td.number, th.number { text-align: right } tr + tr td { border-top: 1px solid #eee }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-size: 12px; color: #555; overflow-wrap: anywhere }
img { display: block; max-width: 100%; border-radius: 3px } .pair { border-left: 3px solid #c60; padding-left: .7rem }
"""


def write_report(folder: Path) -> None:
    """Write report.html in `folder`, from its manifest and frames."""
    store = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    size = store["image_size"]
    frames = np.memmap(folder / "frames.u8", np.uint8, "r", shape=(store["num_frames"], size, size, 3))
    strips = json.loads((folder / "strips.json").read_text(encoding="utf-8"))
    tally = _Tally()
    shown = _Shown(len(store["clips"]), strips.keys())
    first_of: dict[str, tuple[int, int]] = {}  # first frame and length of the originals of duplicates
    originals = {row["duplicate_of"] for row in read_manifest(folder) if row["duplicate_of"]}
    first = 0
    for row in read_manifest(folder):
        tally.add(row)
        shown.add(row, first)
        if row["status"] == "kept":
            if row["id"] in originals:
                first_of[row["id"]] = (first, row["num_frames"])
            first += row["num_frames"]
    sections = [
        f"<h1>Ingest: {tally.num_kept} of {tally.num_clips} clips kept</h1>",
        f"<p>{store['num_frames']:,} frames of {size} x {size} pixels, {tally.kept_s / 3600:.2f} hours at "
        f"{store['fps']:g} frames/s for most clips. Every clip that was asked for is in <code>manifest.parquet</code>.",
        "<h2>What became of the clips</h2>",
        _table(("", "clips"), [("kept", tally.num_kept), *tally.rejected.most_common()]),
        "<h2>Motion of the decoded clips</h2>",
        _histogram(tally.motion),
        "<h2>Kept clips</h2>",
        _figures(_kept_figure(row, first, frames) for row, first in shown.kept),
        f"<h2>Near duplicates: {tally.num_duplicates} found</h2>",
        _figures(_pair_figure(row, first, first_of, frames, strips) for row, first in shown.duplicates),
        "<h2>Rejected clips</h2>",
        _figures(_rejected_figures(shown.rejected_with_strip, strips)),
        _rejected_list(shown.rejected, sum(tally.rejected.values())),
        "<h2>Licences, captions, sources</h2>",
        _table(("licence", "clips kept"), _named(tally.licences, "unknown")),
        _table(("captions from", "clips kept"), _named(tally.origins, "none")),
        _table(("source", "clips kept"), _named(tally.sources, "unknown")),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Ingest report</title>'
        f"<style>{STYLE}</style>{''.join(sections)}</html>\n"
    )
    write_text(folder / "report.html", page)


class _Tally:
    """Counts over the manifest."""

    def __init__(self) -> None:
        self.num_clips = self.num_kept = self.num_duplicates = 0
        self.kept_s = 0.0
        self.rejected: Counter = Counter()
        self.licences: Counter = Counter()
        self.origins: Counter = Counter()
        self.sources: Counter = Counter()
        self.motion: list[float] = []

    def add(self, row: dict) -> None:
        self.num_clips += 1
        self.num_duplicates += row["duplicate_of"] is not None
        if row["motion"] is not None:
            self.motion.append(row["motion"])
        if row["status"] == "rejected":
            self.rejected[row["filter"]] += 1
            return
        self.num_kept += 1
        self.kept_s += row["duration_s"] or 0.0
        self.licences[row["licence"]] += 1
        self.origins[row["caption_origin"]] += 1
        self.sources[row["source"]] += 1


class _Shown:
    """The few rows that the page shows, with the first frame of those that are in the store."""

    def __init__(self, num_kept: int, with_strip: Collection[str]) -> None:
        self._with_strip = with_strip
        self.wanted = set(np.linspace(0, num_kept - 1, min(num_kept, NUM_KEPT_SHOWN)).round().astype(int).tolist())
        self.kept: list[tuple[dict, int]] = []
        self.duplicates: list[tuple[dict, int | None]] = []
        self.rejected: list[dict] = []
        self.rejected_with_strip: list[dict] = []

    def add(self, row: dict, first: int) -> None:
        is_kept = row["status"] == "kept"
        if is_kept and row["store_episode"] in self.wanted:
            self.kept.append((row, first))
        if row["duplicate_of"] is not None and len(self.duplicates) < NUM_PAIRS_SHOWN:
            self.duplicates.append((row, first if is_kept else None))
        if row["id"] in self._with_strip and row["filter"] != "duplicates":
            self.rejected_with_strip.append(row)
        if not is_kept and len(self.rejected) < NUM_REJECTED_LISTED:
            self.rejected.append(row)


def _named(counts: Counter, empty: str) -> list[tuple[str, int]]:
    return [(name or empty, count) for name, count in counts.most_common(20)]


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    def cells(values: tuple, tag: str) -> str:
        return "".join(f"<{tag}{_alignment(value)}>{html.escape(str(value))}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>{body}</table>"


def _alignment(value) -> str:
    return " class=number" if isinstance(value, int) else ""


def _figures(figures: Iterator[str]) -> str:
    return f'<div class="clips">{"".join(figures)}</div>'


def _kept_figure(row: dict, first: int, frames: np.ndarray) -> str:
    strip = _strip(frames, first, row["num_frames"])
    motion = "" if row["motion"] is None else f", motion {row['motion']:.3f}"
    return _figure([strip], f"{row['id']}: {row['caption'] or 'no caption'} ({row['duration_s']:.1f} s{motion})")


def _pair_figure(row: dict, first: int | None, first_of: dict, frames: np.ndarray, strips: dict[str, str]) -> str:
    pair = [_strip(frames, *first_of[row["duplicate_of"]])]
    if first is not None:
        pair.append(_strip(frames, first, row["num_frames"]))
    elif row["id"] in strips:
        pair.append(strips[row["id"]])
    bits = f"{row['duplicate_bits']:.2f} of 64 bits a frame"
    return _figure(pair, f"{row['duplicate_of']} and {row['id']}: {bits}", "pair")


def _rejected_figures(rows: list[dict], strips: dict[str, str]) -> Iterator[str]:
    for row in rows:
        yield _figure([strips[row["id"]]], f"{row['id']}: {row['filter']}: {row['reason']}")


def _rejected_list(rows: list[dict], num_rejected: int) -> str:
    if not rows:
        return "<p>None."
    listed = [(row["id"], row["filter"], row["reason"]) for row in rows]
    more = f"<p>{num_rejected - len(rows)} more are in the manifest." if num_rejected > len(rows) else ""
    return _table(("clip", "filter", "reason"), listed) + more


def _strip(frames: np.ndarray, first: int, num_frames: int) -> str:
    """Four frames of a clip side by side, a JPEG in base64."""
    return base64.b64encode(strip_jpeg(frames[first + shown_positions(num_frames)])).decode()


def _figure(strips: list[str], caption: str, style: str = "") -> str:
    images = "".join(f'<img src="data:image/jpeg;base64,{strip}" alt="">' for strip in strips)
    return f'<figure class="{style}">{images}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _histogram(values: list[float]) -> str:
    """Bars over a logarithmic axis, as SVG."""
    positive = np.array([value for value in values if value > 0])
    num_zero = len(values) - len(positive)
    if not len(positive):
        return "<p>Nothing was measured." if not values else f"<p>{num_zero} clips without any motion."
    low, high = np.log10(positive.min()), max(np.log10(positive.max()), np.log10(positive.min()) + 1e-6)
    counts, edges = np.histogram(np.log10(positive), NUM_BINS, (low, high))
    width, height, bar = 800, 160, 800 / NUM_BINS
    tall = height * counts / counts.max()
    bars = "".join(
        f'<rect x="{index * bar:.1f}" y="{height - tall[index]:.1f}" width="{bar - 1:.1f}" height="{tall[index]:.1f}" '
        f'fill="#47a"><title>{count} clips from {10 ** edges[index]:.4g}</title></rect>'
        for index, count in enumerate(counts)
    )
    ticks = "".join(
        f'<text x="{width * (tick - low) / (high - low):.1f}" y="{height + 18}" font-size="12" '
        f'text-anchor="{anchor}">{10**tick:.3g}</text>'
        for tick, anchor in ((low, "start"), ((low + high) / 2, "middle"), (high, "end"))
    )
    quantiles = ", ".join(f"{q:.0%} below {np.quantile(values, q):.4g}" for q in (0.01, 0.1, 0.5, 0.9, 0.99))
    return (
        f'<svg viewBox="0 0 {width} {height + 24}" width="{width}" role="img">{bars}{ticks}</svg>'
        f"<p>Mean displacement in picture heights a second, logarithmic; {quantiles}; {num_zero} clips with none."
    )
