import math

import numpy as np
import pytest
from lerobot.robots.utils import make_robot_from_config
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError
from lerobot.utils.import_utils import register_third_party_plugins

from envs.config_simulated_tabletop import SimulatedTabletopConfig
from envs.simulated_tabletop import SimulatedTabletop


@pytest.fixture
def robot(tmp_path):
    """A function that connects a robot with options, and disconnects it at the end."""
    robots = []

    def make(**options) -> SimulatedTabletop:
        config = SimulatedTabletopConfig(id="test", calibration_dir=tmp_path, image_size=32, **options)
        robots.append(make_robot_from_config(config))
        robots[-1].connect()
        return robots[-1]

    yield make
    for one in robots:
        one.disconnect()


def test_lerobot_builds_it_by_its_type(robot):
    register_third_party_plugins()
    assert type(robot()).__name__ == "SimulatedTabletop"


def test_observations_and_actions_are_as_its_features_say(robot):
    one = robot()
    observation = one.get_observation()
    assert set(observation) == set(one.observation_features)
    assert observation["top"].shape == one.observation_features["top"] and observation["top"].dtype == np.uint8
    sent = one.send_action({"x.vel": 0.01, "y.vel": -0.01})
    assert set(sent) == set(one.action_features)
    after = one.get_observation()
    assert after["x.pos"] - observation["x.pos"] == pytest.approx(sent["x.vel"], abs=2e-3)


def test_its_expert_solves_the_task_through_the_robots_interface(robot):
    one = robot(seed=3)
    first = one.instruction
    for _ in range(200):
        action = one._connected().expert_action()
        one.send_action({"x.vel": float(action[0]), "y.vel": float(action[1])})
        if one.num_episodes:
            break
    assert (one.num_episodes, one.num_successes) == (1, 1)
    assert one.instruction and first


def test_the_same_seed_is_the_same_scene(robot):
    a, b = robot(seed=5), robot(seed=5)
    assert a.instruction == b.instruction
    assert np.array_equal(a.get_observation()["top"], b.get_observation()["top"])


def test_it_can_be_sent_back_to_a_place(robot):
    one = robot()
    start = one.get_observation()
    for _ in range(5):
        one.send_action({"x.vel": 0.02, "y.vel": 0.0})
    for _ in range(10):
        one.send_action({"x.pos": start["x.pos"], "y.pos": start["y.pos"]})
    assert math.dist([one.get_observation()[k] for k in ("x.pos", "y.pos")], [start["x.pos"], start["y.pos"]]) < 0.005


def test_latency_shows_the_world_as_it_was(robot):
    now, late = robot(seed=1), robot(seed=1, latency_steps=2)
    seen = []
    for _ in range(4):
        seen.append(now.get_observation()["x.pos"])
        for one in (now, late):
            one.send_action({"x.vel": 0.02, "y.vel": 0.0})
    assert late.get_observation()["x.pos"] == seen[2]


def test_dropped_frames_repeat_and_states_may_be_no_numbers(robot):
    one = robot(dropped_frame_share=1.0, nan_share=1.0)
    first = one.get_observation()["top"]
    for _ in range(3):
        one.send_action({"x.vel": 0.03, "y.vel": 0.03})
    observation = one.get_observation()
    assert np.array_equal(observation["top"], first)
    assert math.isnan(observation["x.pos"])


def test_misuse_is_answered(robot, tmp_path):
    one = robot()
    with pytest.raises(DeviceAlreadyConnectedError):
        one.connect()
    with pytest.raises(ValueError, match=r"says nothing of \['y'\]"):
        one.send_action({"x.vel": 0.0})
    with pytest.raises(DeviceNotConnectedError):
        SimulatedTabletop(SimulatedTabletopConfig(id="off", calibration_dir=tmp_path)).get_observation()
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        SimulatedTabletopConfig(nan_share=2.0)
