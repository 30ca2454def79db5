"""One video file to square RGB frames: a single sequential pass, scaled by the decoder."""

from pathlib import Path

import av
import numpy as np

# Containers count frames that an edit list cuts away, so a clip is called cut off only when clearly short.
MIN_DECODED_SHARE = 0.9


def decode_clip(video: Path, output: Path, image_size: int, min_frames: int) -> dict:
    """Write the frames of `video` to `output` as raw RGB bytes (T, image_size, image_size, 3).

    Returns {"num_frames", "fps"}, or {"reason"} for a clip that cannot be used. OSError from writing is raised:
    a full disk is no fault of the clip.
    """
    if video.is_file() and video.stat().st_size == 0:
        return {"reason": "the file is empty"}
    try:
        return _decode(video, output, image_size, min_frames)
    except av.error.FFmpegError as error:
        return {"reason": f"cannot be decoded: {error.strerror}"}
    except OSError:
        raise
    except Exception as error:  # whatever a decoder makes of a damaged file costs one clip, never the run
        return {"reason": f"cannot be decoded: {type(error).__name__}: {error}"}


def _decode(video: Path, output: Path, image_size: int, min_frames: int) -> dict:
    # Some AVI files hold metadata that is no text, which is no reason to refuse the pictures.
    with av.open(str(video), metadata_errors="ignore") as container, output.open("wb") as file:
        if not container.streams.video:
            return {"reason": "no video stream"}
        stream = container.streams.video[0]
        # Clips are decoded side by side; threads within one would only hold back its first frames.
        stream.codec_context.thread_count = 1
        num_frames, times_s = 0, []
        for frame in container.decode(stream):
            if frame.is_corrupt:
                return {"reason": f"frame {num_frames} is damaged"}
            file.write(square_frame(frame, image_size).tobytes())
            num_frames += 1
            if frame.time is not None:
                times_s.append(frame.time)
        fps = _frame_rate(stream, times_s)
        declared = _declared_frames(container, stream, fps)
    if num_frames < MIN_DECODED_SHARE * declared:
        return {"reason": f"cut off: {num_frames} frames of about {declared:.0f}"}
    if num_frames < min_frames:
        return {"reason": f"too short: {num_frames} frames, min_frames is {min_frames}"}
    if not fps:
        return {"reason": "no frame rate"}
    return {"num_frames": num_frames, "fps": round(fps, 3)}


def _frame_rate(stream, times_s: list[float]) -> float:
    """Frames per second; 0 where neither the container nor the timestamps tell."""
    nominal = float(stream.average_rate or 0)
    duration_s = times_s[-1] - times_s[0] if times_s else 0.0
    if duration_s <= 0:
        return nominal
    measured = (len(times_s) - 1) / duration_s
    # Some recorders state 1000 frames/s, the rate of their clock. Where the container is right its value is
    # better: timestamps rounded to milliseconds would give every clip a rate of its own.
    return nominal if abs(nominal / measured - 1) < 0.02 else measured


def _declared_frames(container, stream, fps: float) -> float:
    """The number of frames that the container promises; 0 where it does not say."""
    if stream.frames:
        return stream.frames
    # The container's duration is that of its longest stream, so it tells about the video only if that is alone.
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base * fps
    return 0


def square_frame(frame: av.VideoFrame, image_size: int) -> np.ndarray:
    """(image_size, image_size, 3) uint8: the centre square of a frame, area-averaged and upright."""
    scale = image_size / min(frame.width, frame.height)
    width = max(image_size, round(frame.width * scale))
    height = max(image_size, round(frame.height * scale))
    pixels = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (height - image_size) // 2, (width - image_size) // 2
    pixels = pixels[top : top + image_size, left : left + image_size]
    # Phones store the sensor's picture and the rotation that shows it upright, counter-clockwise in degrees.
    return np.rot90(pixels, round(frame.rotation / 90))
