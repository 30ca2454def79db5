"""The guide docs/deploy.md: its Python example is run as it stands, and its task is the one of its scene."""

import re
import time
from pathlib import Path

import numpy as np

from envs.config_simulated_tabletop import SimulatedTabletopConfig
from envs.simulated_tabletop import SimulatedTabletop
from lapa.schema import Embodiment
from tests.policies.serving.test_server import TOKEN, serving_thread

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "deploy.md"


class RightwardPolicy:
    """Sees the guide's camera and always moves to the right, faster than the robot may."""

    type = "rightward"
    inputs = {"observation.images.top": (3, 64, 64)}
    action_shape = (4, 2)

    def infer(self, observation):
        assert observation["observation.images.top"].shape == (64, 64, 3)
        return np.tile([0.05, 0.0], (4, 1))


def test_the_robot_loop_of_the_guide_moves_the_robot(monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    limits = Embodiment(action_low=[-0.03] * 2, action_high=[0.03] * 2, relative=True)
    monkeypatch.setenv("LAPA_SERVE_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serving_thread(TOKEN, RightwardPolicy(), embodiment=limits) as (server, port):
        assert "port=8000" in example
        names: dict = {}
        exec(compile(example.replace("port=8000", f"port={port}"), str(GUIDE), "exec"), names)
    assert server.metrics.requests == {"ok": 30}
    assert names["safety"].counts.num_commands == 60 and names["safety"].stopped is None
    assert names["robot"].num_episodes >= 1 and not names["robot"].is_connected


def test_the_commands_give_the_task_that_their_scene_asks_for():
    guide = GUIDE.read_text(encoding="utf-8")
    (task,), (seed,) = set(re.findall(r'--task="(.*?)"', guide)), set(re.findall(r"seed[=:] ?(3\d+)", guide))
    robot = SimulatedTabletop(SimulatedTabletopConfig(id="guide", seed=int(seed)))
    robot.connect()
    try:
        assert robot.instruction == task
    finally:
        robot.disconnect()
