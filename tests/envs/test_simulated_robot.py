import math

import numpy as np
import pytest
from lerobot.robots.utils import make_robot_from_config
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError
from lerobot.utils.import_utils import register_third_party_plugins

from envs.config_simulated_gripper import SimulatedGripperConfig
from envs.config_simulated_tabletop import SimulatedTabletopConfig
from envs.simulated_gripper import SimulatedGripper
from envs.simulated_robot import SimulatedRobot
from envs.simulated_tabletop import SimulatedTabletop

STILL = {SimulatedTabletopConfig: {"x.vel": 0.0, "y.vel": 0.0}}
STILL[SimulatedGripperConfig] = {"x.vel": 0.0, "y.vel": 0.0, "z.vel": 0.0, "gripper.pos": 0.08}


@pytest.fixture
def connect(tmp_path):
    """A function that connects a robot of a configuration with options, and disconnects it at the end."""
    robots = []

    def make(kind, **options) -> SimulatedRobot:
        robots.append(make_robot_from_config(kind(id="test", calibration_dir=tmp_path, image_size=32, **options)))
        robots[-1].connect()
        return robots[-1]

    yield make
    for one in robots:
        one.disconnect()


@pytest.fixture
def robot(connect):
    return lambda **options: connect(SimulatedTabletopConfig, **options)


@pytest.mark.parametrize(
    ("kind", "made"), [(SimulatedTabletopConfig, SimulatedTabletop), (SimulatedGripperConfig, SimulatedGripper)]
)
def test_lerobot_builds_it_by_its_type(connect, kind, made):
    register_third_party_plugins()
    assert type(connect(kind)) is made


@pytest.mark.parametrize("kind", STILL)
def test_observations_and_actions_are_as_its_features_say(connect, kind):
    one = connect(kind)
    observation = one.get_observation()
    assert set(observation) == set(one.observation_features)
    assert observation["top"].shape == one.observation_features["top"] and observation["top"].dtype == np.uint8
    sent = one.send_action(STILL[kind] | {"x.vel": 0.01, "y.vel": -0.01})
    assert list(sent) == list(one.action_features)
    after = one.get_observation()
    assert after["x.pos"] - observation["x.pos"] == pytest.approx(sent["x.vel"], abs=3e-3)


@pytest.mark.parametrize(("kind", "family"), [(SimulatedTabletopConfig, "reach"), (SimulatedGripperConfig, "stack")])
def test_its_expert_solves_the_task_through_the_robots_interface(connect, kind, family):
    one = connect(kind, seed=3, family=family)
    assert one.instruction
    for _ in range(200):
        action = one._connected().expert_action()
        one.send_action(dict(zip(one.action_features, map(float, action), strict=True)))
        if one.num_episodes:
            break
    assert (one.num_episodes, one.num_successes) == (1, 1)


def test_one_scene_stays_after_its_task_is_solved(robot):
    one, moving_on = robot(seed=3, one_scene=True), robot(seed=3)
    before, tips = one.instruction, []
    for _ in range(60):
        action = one._connected().expert_action()
        for either in (one, moving_on):
            either.send_action({"x.vel": float(action[0]), "y.vel": float(action[1])})
        tips.append([one.get_observation()[name] for name in ("x.pos", "y.pos")])
    assert moving_on.num_episodes and not one.num_episodes and one.instruction == before
    assert np.abs(np.diff(tips, axis=0)).max() < 0.04, "the tip jumped to another scene"


def test_the_same_seed_is_the_same_scene(robot):
    a, b = robot(seed=5), robot(seed=5)
    assert a.instruction == b.instruction
    assert np.array_equal(a.get_observation()["top"], b.get_observation()["top"])


@pytest.mark.parametrize("kind", STILL)
def test_it_can_be_sent_back_to_a_place(connect, kind):
    one = connect(kind)
    start = {key: value for key, value in one.get_observation().items() if key != "top"}
    for _ in range(5):
        one.send_action(STILL[kind] | {"x.vel": 0.02})
    for _ in range(10):
        one.send_action(start)
    after = one.get_observation()
    assert math.dist(start.values(), [after[key] for key in start]) < 0.005


def test_the_fingers_close_to_what_is_sent(connect):
    one = connect(SimulatedGripperConfig)
    for _ in range(3):
        one.send_action(STILL[SimulatedGripperConfig] | {"gripper.pos": 0.03})
    assert one.get_observation()["gripper.pos"] == pytest.approx(0.03, abs=3e-3)


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
