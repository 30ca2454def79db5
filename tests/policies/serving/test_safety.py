import time

import numpy as np
import pytest

from policies.serving.safety import SafetyLayer, SafetyLimits, SafetyStop, Watchdog

LIMITS = SafetyLimits(
    action_low=(-1.0, -2.0),
    action_high=(1.0, 2.0),
    max_rate=(5.0, 5.0),
    control_hz=10.0,
    max_observation_age_s=0.2,
    watchdog_s=0.3,
)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def layer(**changes) -> tuple[SafetyLayer, Clock]:
    clock = Clock()
    return SafetyLayer(SafetyLimits(**{**vars(LIMITS), **changes}), clock), clock


def test_an_action_within_the_limits_is_sent_as_it_is():
    safety, _ = layer()
    assert safety.bound(np.array([0.3, -1.5])).tolist() == [0.3, -1.5]
    assert (safety.counts.num_commands, safety.counts.num_clipped, safety.counts.num_slowed) == (1, 0, 0)


def test_bounds_hold_for_any_finite_action():
    safety, _ = layer(max_rate=())
    for action in np.random.default_rng(0).normal(scale=100, size=(1000, 2)):
        command = safety.bound(action)
        assert (np.abs(command) <= [1.0, 2.0]).all()
    assert safety.counts.num_clipped > 900


def test_absolute_actions_move_no_faster_than_allowed():
    safety, clock = layer()
    commands = []
    for target in ([0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [-1.0, 2.0]):
        commands.append(safety.bound(np.array(target)))
        clock.now += 0.1
    assert (np.abs(np.diff(commands, axis=0)) <= 0.5 + 1e-9).all()
    assert safety.counts.num_slowed == 3


def test_after_a_reset_rates_count_from_where_the_robot_is():
    safety, _ = layer()
    safety.reset(current=np.array([-1.0, 0.0]))
    assert safety.bound(np.array([1.0, 0.0])).tolist() == [-0.5, 0.0]


def test_relative_actions_are_limited_by_their_size():
    safety, clock = layer(relative=True)
    assert safety.bound(np.array([0.9, -2.0])).tolist() == [0.5, -0.5]
    clock.now += 0.1
    assert safety.bound(np.array([0.9, 0.1])) == pytest.approx([0.5, 0.1])


def test_a_long_pause_does_not_allow_a_longer_move():
    safety, clock = layer(watchdog_s=0.0)
    safety.bound(np.zeros(2))
    clock.now += 60
    assert safety.bound(np.array([1.0, 0.0])).tolist() == [0.5, 0.0]


@pytest.mark.parametrize("relative", [False, True])
def test_many_commands_at_once_move_no_further_than_time_allows(relative):
    safety, clock = layer(relative=relative)
    start = safety.bound(np.zeros(2))
    commands = []
    for _ in range(100):
        clock.now += 0.001
        commands.append(safety.bound(np.ones(2)))
    moved = np.sum(commands, axis=0) if relative else commands[-1] - start
    assert (moved <= 5.0 * 0.1 + 1e-9).all()


def test_a_loop_that_ends_in_error_stops_the_robot():
    stops: list[str] = []
    safety, _ = layer()
    with pytest.raises(ConnectionError), Watchdog(safety, stops.append, every_s=10):
        safety.bound(np.zeros(2))
        raise ConnectionError("the server is gone")
    assert len(stops) == 1 and "the server is gone" in stops[0]


def test_stopping_is_tried_again_where_it_fails():
    attempts: list[str] = []

    def stop(reason: str) -> None:
        attempts.append(reason)
        if len(attempts) < 3:
            raise OSError("the port is in use")

    safety = SafetyLayer(LIMITS)
    with Watchdog(safety, stop, every_s=0.01):
        safety.stop("on purpose")
        deadline = time.monotonic() + 10
        while len(attempts) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(attempts) == 3


@pytest.mark.parametrize("bad", [[np.nan, 0.0], [0.0, np.inf], [0.0], [[0.0, 0.0]], []])
def test_an_action_that_is_not_one_stops_the_robot_until_a_human_resets_it(bad):
    safety, _ = layer()
    with pytest.raises(SafetyStop, match=r"not finite|shape"):
        safety.bound(np.array(bad))
    with pytest.raises(SafetyStop, match=r"not finite|shape"):
        safety.bound(np.zeros(2))
    assert safety.counts.num_stops == 1 and safety.counts.num_commands == 0
    safety.reset()
    assert safety.bound(np.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("action", [[1.5, 0.0], [0.9, 0.0]])
def test_beyond_the_limits_can_mean_stop(action):
    safety, _ = layer(on_limit="stop")
    safety.reset(current=np.zeros(2))
    with pytest.raises(SafetyStop, match="beyond the limits"):
        safety.bound(np.array(action))


def test_a_stale_observation_stops_the_robot():
    safety, clock = layer()
    safety.check_observation({"state": np.zeros(2)}, clock.now - 0.15)
    with pytest.raises(SafetyStop, match=r"0\.250 s old"):
        safety.check_observation({"state": np.zeros(2)}, clock.now - 0.25)


def test_an_observation_from_the_future_stops_the_robot():
    safety, clock = layer()
    with pytest.raises(SafetyStop, match="old"):
        safety.check_observation({}, clock.now + 5)


@pytest.mark.parametrize("value", [np.array([0.0, np.nan]), np.float32(np.inf), [1.0, float("nan")]])
def test_an_observation_that_is_not_finite_stops_the_robot(value):
    safety, clock = layer()
    with pytest.raises(SafetyStop, match="state of the observation"):
        safety.check_observation({"image": np.zeros((2, 2, 3), np.uint8), "state": value}, clock.now)


def test_the_watchdog_wants_a_command_now_and_then():
    safety, clock = layer()
    safety.require_fresh()
    safety.bound(np.zeros(2))
    clock.now += 0.25
    safety.require_fresh()
    clock.now += 0.1
    with pytest.raises(SafetyStop, match=r"no command for 0\.350 s"):
        safety.require_fresh()
    with pytest.raises(SafetyStop, match="no command"):
        safety.bound(np.zeros(2))


def test_a_policy_that_hangs_is_stopped_by_the_watchdogs_own_thread():
    stops: list[str] = []
    safety = SafetyLayer(SafetyLimits(**{**vars(LIMITS), "watchdog_s": 0.05}))
    with Watchdog(safety, stops.append, every_s=0.01):
        safety.bound(np.zeros(2))
        deadline = time.monotonic() + 10
        while not stops and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(stops) == 1 and "no command" in stops[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_low": (-1.0,)}, "one an action dimension"),
        ({"action_low": (1.0, 0.0)}, "below action_high"),
        ({"action_high": (np.nan, 1.0)}, "finite"),
        ({"max_rate": (1.0,)}, "max_rate"),
        ({"max_rate": (1.0, 0.0)}, "positive"),
        ({"control_hz": 0.0}, "control_hz"),
        ({"watchdog_s": -1.0}, "watchdog_s"),
        ({"on_limit": "wait"}, "clip or stop"),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        layer(**changes)
