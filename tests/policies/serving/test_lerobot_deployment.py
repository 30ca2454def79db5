"""LeRobot's own ways to run a policy on a robot, with ours on the simulated one."""

import pickle
import socket
import sys
import threading

import numpy as np
import pytest
from lerobot.configs import PreTrainedConfig

import lerobot_policy_lapa  # noqa: F401  registers policy and robots
from envs.config_simulated_tabletop import SimulatedTabletopConfig
from policies.serving import lerobot_async


def robot_config(tmp_path) -> SimulatedTabletopConfig:
    return SimulatedTabletopConfig(id="sim", calibration_dir=tmp_path, image_size=32)


@pytest.mark.parametrize("inference", ["sync", "rtc"])
def test_lerobot_rollout_moves_the_robot(policy_folder, tmp_path, monkeypatch, inference):
    from lerobot.rollout import RolloutConfig, build_rollout_context, create_strategy
    from lerobot.rollout.inference import RTCInferenceConfig, SyncInferenceConfig

    monkeypatch.setattr(sys, "argv", ["lerobot-rollout"])
    policy = PreTrainedConfig.from_pretrained(policy_folder)
    policy.pretrained_path = str(policy_folder)
    engine = SyncInferenceConfig() if inference == "sync" else RTCInferenceConfig()
    cfg = RolloutConfig(
        robot=robot_config(tmp_path),
        policy=policy,
        inference=engine,
        fps=20.0,
        duration=2.0,
        task="go to the red moon",
        play_sounds=False,
        return_to_initial_position=False,
    )
    context = build_rollout_context(cfg, threading.Event())
    robot = context.hardware.robot_wrapper.inner
    moves = []
    send = robot.send_action
    monkeypatch.setattr(robot, "send_action", lambda action: moves.append(send(action)) or moves[-1])
    strategy = create_strategy(cfg.strategy)
    try:
        strategy.setup(context)
        strategy.run(context)
    finally:
        strategy.teardown(context)
    assert len(moves) >= 5
    assert any(abs(value) > 1e-4 for move in moves for value in move.values())
    assert not robot.is_connected


def test_lerobots_async_client_drives_the_robot_through_our_server(policy_folder, tmp_path, monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.chdir(tmp_path)  # LeRobot's client and server log into ./logs
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = lerobot_async.build_server(policy_folder, port=port, fps=20, obs_queue_timeout=0.5)
    listener = lerobot_async.start(server)
    try:
        client = RobotClient(
            RobotClientConfig(
                robot=robot_config(tmp_path),
                server_address=f"127.0.0.1:{port}",
                policy_type="lapa",
                pretrained_name_or_path="somewhere/else",
                actions_per_chunk=3,
                fps=20,
            )
        )
        assert client.start()
        receiver = threading.Thread(target=client.receive_actions, daemon=True)
        control = threading.Thread(target=client.control_loop, args=("go to the red moon",), daemon=True)
        receiver.start()
        control.start()
        robot, start = client.robot, client.robot.get_observation()
        deadline = threading.Event()
        for _ in range(200):
            deadline.wait(0.1)
            if abs(robot.get_observation()["x.pos"] - start["x.pos"]) > 0.01:
                break
        moved = abs(robot.get_observation()["x.pos"] - start["x.pos"])
        client.shutdown_event.set()
        control.join(5)
        client.stop()
        assert moved > 0.01
        assert str(server.policy.config.type) == "lapa"
    finally:
        listener.stop(grace=0)


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("thing", [Harmful(), np.random.default_rng(0), socket.socket])
def test_only_messages_are_unpickled(thing, capsys):
    with pytest.raises(pickle.UnpicklingError, match="not part of LeRobot's messages"):
        lerobot_async.loads(pickle.dumps(thing))
    assert "must not run" not in capsys.readouterr().out


def test_an_observation_survives_the_unpickler():
    from lerobot.async_inference.helpers import TimedObservation

    observation = {"x.pos": 0.5, "top": np.zeros((4, 4, 3), np.uint8), "task": "go"}
    for values in (observation, observation | {"x.pos": np.float64(0.5)}, observation | {"x.pos": np.float32(0.5)}):
        sent = TimedObservation(timestamp=1.0, timestep=2, observation=values, must_go=True)
        back = lerobot_async.loads(pickle.dumps(sent))
        assert back.get_timestep() == 2 and np.array_equal(back.get_observation()["top"], observation["top"])


def test_nearness_is_in_the_states_own_units():
    assert lerobot_async.farther({"x.pos": 0.02}, {"x.pos": 0.0}, 0.01)
    assert not lerobot_async.farther({"x.pos": 0.02, "task": "go"}, {"x.pos": 0.015}, 0.01)
    assert lerobot_async.farther({"x.pos": np.float32(0.02)}, {"x.pos": np.float32(0.0)}, 0.01)


@pytest.mark.parametrize(("nearness", "looked_at"), [(0.0, True), (0.005, True), (0.02, False)])
def test_a_robot_that_moved_by_a_centimetre_is_looked_at_again(policy_folder, nearness, looked_at):
    """LeRobot's server leaves out what differs by less than 1 from the last observation, in any unit."""
    pytest.importorskip("grpc")
    from lerobot.async_inference.helpers import TimedObservation

    server = lerobot_async.build_server(policy_folder, nearness)
    for timestep, x in enumerate([0.10, 0.11]):
        values = {"x.pos": x, "y.pos": 0.0, "top": np.zeros((4, 4, 3), np.uint8), "task": "go"}
        seen = TimedObservation(timestamp=0.0, timestep=timestep, observation=values)
        entered = server._enqueue_observation(seen)
        server.last_processed_obs = seen
    assert entered is looked_at


def test_the_async_server_stays_on_this_machine(policy_folder, tmp_path):
    with pytest.raises(ValueError, match="no authentication"):
        lerobot_async.build_server(policy_folder, host="0.0.0.0")
    with pytest.raises(ValueError, match="no LeRobot policy"):
        lerobot_async.build_server(tmp_path)
