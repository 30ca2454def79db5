"""Tiny clips for the tests: noise that brightens with time."""

import io
from pathlib import Path

import av
import numpy as np

NUM_FRAMES, FPS, SIZE = 12, 10, (32, 32)


def frames(num_frames: int = NUM_FRAMES, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """(T, H, W, 3) uint8; noise, because flat pictures leave nothing to cut off."""
    noise = np.random.default_rng(seed).integers(0, 80, (num_frames, size[1], size[0], 3), dtype=np.uint8)
    return noise + (150 * np.arange(num_frames) // num_frames).astype(np.uint8)[:, None, None, None]


def write_clip(
    path: Path,
    num_frames: int = NUM_FRAMES,
    fps: int = FPS,
    size: tuple[int, int] = SIZE,
    codec: str = "mpeg4",
    seed: int = 0,
    times: list[int] | None = None,
    muxer: dict | None = None,
    format: str | None = None,
) -> Path:
    """An encoded clip; `times` are the frames' times in units of 1/fps, for rates that vary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for step, pixels in enumerate(frames(num_frames, size, seed)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[step] if times else step
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def clip_bytes(tmp_path: Path, **options) -> bytes:
    return write_clip(tmp_path / "scratch.mp4", **options).read_bytes()


def images(num_frames: int, format: str = "JPEG", size: tuple[int, int] = SIZE) -> list[bytes]:
    """Encoded pictures, one a frame."""
    from PIL import Image

    encoded = []
    for pixels in frames(num_frames, size):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format)
        encoded.append(file.getvalue())
    return encoded
