"""A LIBERO task as an environment of this package. LIBERO asks on the terminal when it is imported; here it never does.

Not tried against LIBERO itself: its scenes are on a hub that the machine this was written on does not reach.
"""

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.adapted_env import AdaptedEnv
from envs.libero_suite import NUM_STEPS

CONTROL_HZ = 20
CAMERA = "agentview"
NUM_SETTLING_STEPS = 10
STAND_STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def import_libero() -> Any:
    """The module libero.libero, without questions and downloads.

    Raises ValueError where hf-libero or its assets are missing, with the commands that bring them.
    """
    install = (
        "install it in an environment of its own, since it brings a second OpenCV: "
        "pip install 'lerobot_policy_lapa[libero]'"
    )
    try:
        found = importlib.util.find_spec("libero.libero")
    except ModuleNotFoundError:
        found = None
    if found is None or not found.origin:
        raise ValueError(f"env=libero needs the package hf-libero: {install}")
    root = Path(found.origin).parent
    assets = [root / "assets", Path("~/.cache/libero/assets").expanduser()]
    if not any((folder / "stable_scanned_objects").is_dir() for folder in assets):
        raise ValueError(
            f"LIBERO's assets are in none of {[str(folder) for folder in assets]}, and nothing is downloaded while a "
            "stage runs: with a network, run python -c 'from libero.libero.utils.download_utils import "
            "download_assets_from_huggingface as d; d()' once"
        )
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser()
    if not (folder / "config.yaml").is_file():
        # Without this file its import asks for a folder and waits for an answer.
        folder = Path(tempfile.mkdtemp(prefix="libero-config-"))
        names = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets", "assets": "assets"}
        paths = {"benchmark_root": str(root)} | {key: str(root / name) for key, name in names.items()}
        (folder / "config.yaml").write_text(json.dumps(paths), encoding="utf-8")  # JSON is YAML
        os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    return importlib.import_module("libero.libero")


class LiberoEnv(AdaptedEnv):
    """A Panda arm moved by displacements of its hand at 20 Hz.

    Observation: {"pixels": (image_size, image_size, 3) uint8 of the camera "agentview", upright, "agent_pos": (8,)
    float32}: the hand's position in metres, its rotation as a vector in radians, and the two fingers in metres.
    Action: (7,) float32 in [-1, 1]: displacement and rotation of the hand in LIBERO's units; the gripper, 1 closes.
    The objects are placed by LIBERO's own sampler, from the seed. LIBERO's stored initial states are pickles, which
    nothing here loads.

    Args:
        task: one of envs.libero_suite.TASKS, such as libero_goal-3.
        image_size: frame height and width in pixels.

    Raises:
        ValueError: where LIBERO or its assets are missing.
    """

    robot_type = "panda"

    def __init__(self, task: str, image_size: int = 128) -> None:
        libero = import_libero()
        from libero.libero import benchmark
        from libero.libero.envs import OffScreenRenderEnv

        name, _, index = task.rpartition("-")
        described = benchmark.get_benchmark_dict()[name]().get_task(int(index))
        bddl_file = Path(libero.get_libero_path("bddl_files")) / described.problem_folder / described.bddl_file
        self._simulation = OffScreenRenderEnv(
            bddl_file_name=str(bddl_file),
            camera_heights=image_size,
            camera_widths=image_size,
            camera_names=[CAMERA],
            control_freq=CONTROL_HZ,
        )
        self._seen: dict[str, np.ndarray] = {}
        super().__init__(
            task,
            described.language,
            image_size,
            True,
            CONTROL_HZ,
            NUM_STEPS[name],
            spaces.Box(-10.0, 10.0, (8,), np.float32),
            spaces.Box(-1.0, 1.0, (7,), np.float32),
        )

    def _begin(self, seed: int) -> None:
        # robosuite draws from numpy's global generator.
        before = np.random.get_state()  # noqa: NPY002
        try:
            self._simulation.seed(seed)
            self._seen = self._simulation.reset()
        finally:
            np.random.set_state(before)  # noqa: NPY002
        for _ in range(NUM_SETTLING_STEPS):
            self._seen, *_ = self._simulation.step(np.array(STAND_STILL))

    def _advance(self, action: np.ndarray) -> bool:
        self._seen, *_ = self._simulation.step(action)
        return self._simulation.check_success()

    def _state(self) -> np.ndarray:
        rotation = rotation_vector(self._seen["robot0_eef_quat"])
        return np.concatenate([self._seen["robot0_eef_pos"], rotation, self._seen["robot0_gripper_qpos"]])

    def render(self) -> np.ndarray:
        """The camera's frame, (image_size, image_size, 3) uint8."""
        # LIBERO's frames stand on their heads.
        return np.ascontiguousarray(self._seen[f"{CAMERA}_image"][::-1, ::-1])


def rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle (3,), radians, of a unit quaternion x, y, z, w."""
    length = np.linalg.norm(quaternion[:3])
    angle = 2 * np.arctan2(length, quaternion[3])
    return quaternion[:3] / max(length, 1e-9) * angle
