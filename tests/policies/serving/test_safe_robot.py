"""The safety layer around the simulated robot, with the faults that it can make."""

import time

import numpy as np
import pytest

import lerobot_policy_lapa  # noqa: F401  registers the simulated robot
from policies.serving.config_safe_robot import SafeRobotConfig
from policies.serving.safe_robot import SafeRobot
from policies.serving.safety import SafetyStop

LIMITS = {"action_low": [-0.03, -0.03], "action_high": [0.03, 0.03], "max_rate": [0.1, 0.1], "relative": True}


@pytest.fixture
def safe_robot(tmp_path):
    """A function that connects a safe simulated robot with limits and faults."""
    robots = []

    def make(limits=None, **faults) -> SafeRobot:
        inner = {"type": "simulated_tabletop", "calibration_dir": str(tmp_path), "image_size": 32, **faults}
        robots.append(SafeRobot(SafeRobotConfig(robot=inner, calibration_dir=tmp_path, **(LIMITS | (limits or {})))))
        robots[-1].connect()
        return robots[-1]

    yield make
    for robot in robots:
        robot.disconnect()


def test_actions_are_bounded_before_they_reach_the_robot(safe_robot):
    robot = safe_robot()
    before = robot.get_observation()
    sent = robot.send_action({"x.vel": 5.0, "y.vel": 0.0})
    assert abs(sent["x.vel"]) <= 0.01 + 1e-6
    assert abs(robot.get_observation()["x.pos"] - before["x.pos"]) < 0.015
    assert robot.safety.counts.num_clipped == robot.safety.counts.num_slowed == 1


def test_a_state_that_is_no_number_stops_it(safe_robot):
    robot = safe_robot(nan_share=1.0)
    with pytest.raises(SafetyStop, match="not finite"):
        robot.get_observation()
    with pytest.raises(SafetyStop, match="not finite"):
        robot.send_action({"x.vel": 0.0, "y.vel": 0.0})


@pytest.mark.parametrize("action", [{"x.vel": np.nan, "y.vel": 0.0}, {"x.vel": 0.0}])
def test_an_action_that_is_none_stops_it(safe_robot, action):
    robot = safe_robot()
    robot.get_observation()
    with pytest.raises(SafetyStop, match=r"not finite|lacks"):
        robot.send_action(action)


def test_it_does_not_act_on_what_it_saw_long_ago(safe_robot):
    robot = safe_robot({"max_observation_age_s": 0.05, "watchdog_s": 0.0})
    robot.get_observation()
    time.sleep(0.1)
    with pytest.raises(SafetyStop, match="old"):
        robot.send_action({"x.vel": 0.0, "y.vel": 0.0})


def test_a_policy_that_hangs_loses_the_robot(safe_robot):
    robot = safe_robot({"watchdog_s": 0.1})
    robot.get_observation()
    robot.send_action({"x.vel": 0.0, "y.vel": 0.0})
    deadline = time.monotonic() + 10
    while robot.is_connected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not robot.is_connected
    with pytest.raises(SafetyStop, match="no command"):
        robot.send_action({"x.vel": 0.0, "y.vel": 0.0})


def test_limits_of_another_robot_are_refused(safe_robot):
    with pytest.raises(ValueError, match="action_low has 1 numbers, simulated_tabletop takes 2"):
        safe_robot({"action_low": [-1.0], "action_high": [1.0], "max_rate": []})


@pytest.mark.parametrize("inner", [{"type": "toaster"}, {}, {"type": "simulated_tabletop", "colour": "red"}])
def test_a_robot_that_lerobot_does_not_know_is_refused(inner, tmp_path):
    with pytest.raises(ValueError, match="no configuration of a robot"):
        SafeRobot(SafeRobotConfig(robot=inner, calibration_dir=tmp_path, **LIMITS))
