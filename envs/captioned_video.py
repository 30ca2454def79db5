"""Short episode videos for people: enlarged frames with the instruction underneath."""

from pathlib import Path

import av
import cv2
import numpy as np

SIZE = 256  # smallest height and width of the picture, pixels
LINE_HEIGHT = 18
FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.42


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if cv2.getTextSize(longer, FONT, FONT_SCALE, 1)[0][0] <= width - 8 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def captioned(frame: np.ndarray, lines: list[str]) -> np.ndarray:
    """The frame (H, W, 3), enlarged to at least SIZE, over a white strip with the lines of text."""
    factor = -(-SIZE // frame.shape[0])
    picture = cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    # H.264 with half-size chroma needs even sides.
    strip = np.full((2 * ((LINE_HEIGHT * len(lines) + 8) // 2), picture.shape[1], 3), 255, np.uint8)
    for number, line in enumerate(lines):
        place = (4, LINE_HEIGHT * (number + 1) - 4)
        cv2.putText(strip, line, place, FONT, FONT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([picture, strip])


def write_captioned_video(path: Path, frames: list[np.ndarray], caption: str, fps: int) -> None:
    """Write frames (H, W, 3) uint8 as an MP4 that browsers play; it appears only when complete."""
    width = frames[0].shape[1] * -(-SIZE // frames[0].shape[0])
    lines = wrap(caption, width)
    pictures = [captioned(frame, lines) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    # x264 prints its statistics through libav's own log, past Python's.
    av.logging.set_libav_level(av.logging.ERROR)
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "movflags": "faststart"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)
