"""An exported policy (`lapa export`) as a function from an observation to actions: numpy and onnxruntime, no torch.

    policy = OnnxPolicy("outputs/robot/exported")
    actions = policy.infer({"observation.images.top": frame, "task": "move to the blue moon"})

`lapa serve` takes such a folder too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lapa.text import word_ids

NETWORK_FILE, EXPORT_FILE = "model.onnx", "export.json"
INSTALL = "exported policies need onnx, onnxscript and onnxruntime: pip install 'lerobot_policy_lapa[export]'"


class OnnxPolicy:
    """A folder of `lapa export`.

    Attributes:
        inputs: name and shape of each observation that it needs: the camera (3, H, W), and perhaps the state (P,).
        action_shape: (T, A) of what `infer` returns.

    Args:
        num_threads: of the network.

    Raises:
        ValueError: where the folder is no finished export.
        ImportError: where onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path, num_threads: int = 1) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ImportError(INSTALL) from None
        folder = Path(folder).expanduser()
        if not is_export(folder):
            raise ValueError(f"no {EXPORT_FILE} in {folder}: expected a folder written by `lapa export`")
        description = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
        self.type = description["policy"]
        self.camera, self.image_size = description["camera"], description["inputs"]["images"][1][-1]
        self.inputs: dict[str, tuple[int, ...]] = {self.camera: tuple(description["camera_shape"])}
        self.state = description.get("state")
        if self.state:
            self.inputs[self.state] = tuple(description["inputs"]["state"][1][1:])
            self.state_scale_P = np.array(description["state_scale"], np.float32)
            self.state_offset_P = np.array(description["state_offset"], np.float32)
        self.action_shape = tuple(description["outputs"]["chunk"][1][1:])
        self.max_words = description["max_words"]
        self.scale_A = np.array(description["action_scale"], np.float32)
        self.offset_A = np.array(description["action_offset"], np.float32)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        self.session = onnxruntime.InferenceSession(folder / NETWORK_FILE, options, providers=["CPUExecutionProvider"])

    def infer(self, observation: dict[str, Any]) -> np.ndarray:
        """Actions (T, A) float32 in the robot's units, for an image (H, W, 3) uint8 of any size, a state (P,) float32
        and `task`.
        """
        image_HWC = resize(observation[self.camera].astype(np.float32) / 255, self.image_size)
        ids = word_ids(observation["task"], self.max_words)
        ids_BW = np.array([ids + [0] * (self.max_words - len(ids))], np.int64)
        inputs = {"images": np.ascontiguousarray(image_HWC.transpose(2, 0, 1)[None]), "ids": ids_BW}
        if self.state:
            inputs["state"] = (observation[self.state] * self.state_scale_P + self.state_offset_P)[None]
        (chunk_BTA,) = self.session.run(["chunk"], inputs)
        return chunk_BTA[0] * self.scale_A + self.offset_A


def is_export(folder: str | Path) -> bool:
    """Whether `lapa export` finished in this folder."""
    return (Path(folder).expanduser() / EXPORT_FILE).is_file()


def resize(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The image as (size, size, C) by antialiased bilinear interpolation, as torch does it in training."""
    height, width = image_HWC.shape[:2]
    if (height, width) == (size, size):
        return image_HWC
    rows, columns = triangle_weights(height, size), triangle_weights(width, size)
    return np.einsum("yh,hwc,xw->yxc", rows, image_HWC, columns, optimize=True)


def triangle_weights(before: int, after: int) -> np.ndarray:
    """(after, before) float32: how much each old pixel counts for a new one along one axis."""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale
    distances = np.abs(np.arange(before) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.clip(1 - distances, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
