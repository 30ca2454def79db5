"""Recorded actions carried out again in simulation: do they lead where they led when they were recorded?

Environments are made by Gymnasium, from an id; episodes of `lapa demos` say themselves from which seed they began.
"""

import json
from typing import Any

import gymnasium
import numpy as np

import lerobot_policy_lapa  # noqa: F401  registers our environments
from policies.preflight.recording import Finding, Recording


def check_replay(recording: Recording, cfg) -> list[Finding]:
    """Replay a few episodes, spread evenly, and compare states on the way."""
    begun = beginnings(recording, cfg)
    if begun is None:
        return [
            Finding(
                "replay",
                "skip",
                "no simulation of this robot is known: replay_env=<Gymnasium id> names one, or replay an episode on "
                "the robot itself, slowly, with lerobot-replay",
            )
        ]
    if recording.states is None:
        return [Finding("replay", "skip", "the data set has no states to compare with")]
    picked = np.unique(np.linspace(0, recording.num_episodes - 1, cfg.num_replays).round().astype(int))
    deviations, successes = {}, []
    for episode in picked:
        env_id, options, seed = begun[episode]
        deviation, success = replay(env_id, options, seed, recording, int(episode))
        deviations[int(episode)] = deviation
        successes.append(success)
    numbers = {"deviation": deviations, "success": successes}
    far = {episode: found for episode, found in deviations.items() if found > cfg.replay_tolerance}
    if far:
        return [
            Finding(
                "replay",
                "fail",
                f"replayed states are up to {max(far.values()):.4g} off the recorded ones in episodes {list(far)}: "
                "actions and states are of different units or times, or the simulation is another",
                numbers,
            )
        ]
    message = f"recorded actions lead to the recorded states in episodes {picked.tolist()}"
    return [Finding("replay", "pass", message, numbers)]


def beginnings(recording: Recording, cfg) -> list[tuple[str, dict[str, Any], int]] | None:
    """(Gymnasium id, options, seed) of every episode; None where nothing says them."""
    if cfg.replay_env is not None:
        return [(cfg.replay_env, dict(cfg.replay_options), cfg.replay_seed + e) for e in range(recording.num_episodes)]
    made = recording.folder.parent
    if not (made / "demos.json").is_file() or not (made / "episodes.jsonl").is_file():
        return None
    options = json.loads((made / "demos.json").read_text(encoding="utf-8"))["options"]
    lines = (made / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    episodes = [json.loads(line) for line in lines if line.strip()]
    if len(episodes) != recording.num_episodes:
        return None
    taken = {name: options[name] for name in ("image_size", "split", "variant")} | dict(cfg.replay_options)
    taken |= {"num_blocks": tuple(options["num_blocks"]), "observe_pixels": False}
    id_of = {spec.kwargs.get("family"): spec.id for spec in gymnasium.registry.values()}
    return [(id_of[episode["family"]], taken, episode["seed"]) for episode in episodes]


def replay(env_id: str, options: dict[str, Any], seed: int, recording: Recording, episode: int) -> tuple[float, bool]:
    """The largest distance between recorded and simulated states, and whether the environment called it a success."""
    assert recording.states is not None
    env = gymnasium.make(env_id, disable_env_checker=True, **options)
    try:
        observation, _ = env.reset(seed=seed)
        deviation, success = 0.0, False
        rows = recording.rows(episode)
        for action, state in zip(recording.actions[rows], recording.states[rows], strict=True):
            simulated = np.ravel(observation["agent_pos"] if isinstance(observation, dict) else observation)
            if simulated.shape != state.shape:
                raise ValueError(f"{env_id} has a state of {simulated.shape} numbers, the data set of {state.shape}")
            deviation = max(deviation, float(np.abs(simulated - state).max()))
            observation, _, _, _, info = env.step(action.astype(np.float32))
            success |= bool(info.get("is_success", False))
    finally:
        env.close()
    return deviation, success
