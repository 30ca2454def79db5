"""Video files that frames are appended to, whose clock counts frames; packets are copied without encoding anew."""

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av


class Packets(NamedTuple):
    """All packets of a stream in the order they are decoded, one a frame."""

    packets: list
    order: list[int]  # of each packet: the position of its frame among the frames shown
    delay: int  # frames that the decoder waits for, because of B-frames


def read_packets(container, stream, num_frames: int) -> Packets | None:
    """The packets of a stream; None where they are not `num_frames` frames, one each, from a key frame on."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    times = [packet.pts for packet in packets if packet.pts is not None]
    if not len(packets) == len(times) == num_frames or not packets[0].is_keyframe or packets[0].is_discard:
        return None
    position = {time: number for number, time in enumerate(sorted(times))}
    if len(position) != num_frames:
        return None
    order = [position[time] for time in times]
    return Packets(packets, order, max(number - place for number, place in enumerate(order)))


class VideoOutput:
    """A video file being written."""

    def __init__(self, path: Path, container, stream, delay: int, parameters: bytes, fps: int):
        self.path, self.container, self.stream = path, container, stream
        self.delay, self._parameters, self._fps = delay, parameters, fps
        self.num_frames = 0

    @classmethod
    def copy_of(cls, path: Path, template, delay: int, fps: int) -> "VideoOutput":
        """A file for the packets of the stream `template` and of others like it."""
        container = av.open(str(path), "w")
        # Opaque: the packets are only passed on, and there may be a decoder for them but no encoder.
        stream = container.add_stream_from_template(template, opaque=True)
        stream.time_base = Fraction(1, fps)
        return cls(path, container, stream, delay, template.codec_context.extradata or b"", fps)

    def takes(self, stream, delay: int) -> bool:
        """Whether the packets of another stream can follow: they are decoded with this file's parameters."""
        return (stream.codec_context.extradata or b"") == self._parameters and delay <= self.delay

    def append(self, packets: Packets) -> int:
        """Write the packets behind what is there; returns the number of their first frame."""
        start = self.num_frames
        for number, (packet, place) in enumerate(zip(packets.packets, packets.order, strict=True)):
            packet.pts, packet.dts = start + place, start + number - self.delay
            packet.duration, packet.time_base = 1, Fraction(1, self._fps)
            packet.stream = self.stream
            self.container.mux(packet)
        self.num_frames += len(packets.packets)
        return start

    def close(self) -> None:
        self.container.close()
