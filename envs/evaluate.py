"""`lapa evaluate`: the success of any LeRobot policy in a simulated suite, on paired initial states.

output_dir/
    episodes.jsonl  one line an episode, written batch by batch: family (the task), index, seed, split, variant and
                    action_repeat where the suite has them, instruction, success, steps, return, and error where the
                    simulator failed
    results.json    success with its 95% Wilson interval, a task and overall
    videos/         the first episodes of every task, with their instruction

Episode i of a task starts from seed cfg.seed + i whatever the policy, so that policies can be compared in pairs.
"""

import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from envs.captioned_video import write_captioned_video
from envs.policy_folder import Policy, PolicyFolder
from envs.suites import SuiteEnv, choose, load_suite, make_env
from envs.workers import worker_pool

log = logging.getLogger(__name__)


def run(cfg) -> dict:
    """Evaluate the policy that `cfg` (lapa.schema.EvaluateConfig) names; goes on where a killed run stopped.

    Returns success_rate, success_low and success_high (95%) overall, success_<task>, num_episodes, num_errors.
    With more than one worker, the results are those of one worker that computes with as many threads as each of them.

    Raises:
        ValueError: for an unknown task, or a policy that does not fit the suite.
    """
    if cfg.num_workers > 1:
        return evaluate(None, cfg)
    set_num_threads(cfg.runtime.num_threads)
    return evaluate(PolicyFolder(cfg.policy, cfg.runtime.device, cfg.image_size), cfg)


def set_num_threads(num_threads: int) -> None:
    """Of torch in this process; 0 leaves them as they are."""
    if num_threads:
        import torch

        torch.set_num_threads(num_threads)


def evaluate(policy: Policy | None, cfg) -> dict:
    """The same for a policy in memory; None: cfg.num_workers processes load cfg.policy."""
    suite, tasks = choose(cfg)
    output_dir = Path(cfg.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    episodes_path = output_dir / "episodes.jsonl"
    episodes = read_episodes(episodes_path)
    finished = {(episode["family"], episode["index"]) for episode in episodes}

    # A batch is done again as a whole: what a policy draws at random depends on its batch.
    firsts = range(0, cfg.num_episodes, cfg.num_envs)
    every_batch = [(task, range(i, min(i + cfg.num_envs, cfg.num_episodes))) for task in tasks for i in firsts]
    batches = [(task, batch) for task, batch in every_batch if not {(task, index) for index in batch} <= finished]
    total = cfg.num_episodes * len(tasks)
    with (
        tqdm(total=total, initial=len(finished), desc="evaluate", unit="episode") as bar,
        episodes_path.open("a", encoding="utf-8") as file,
    ):
        for records in roll_out(policy, cfg, suite, batches):
            new = [episode for episode in records if (episode["family"], episode["index"]) not in finished]
            file.writelines(json.dumps(episode) + "\n" for episode in new)
            file.flush()
            bar.update(len(new))

    episodes = read_episodes(episodes_path)
    results = {
        "policy": cfg.policy,
        "env": cfg.env,
        **suite_options(suite, cfg),
        "seed": cfg.seed,
        "families": {task: summary([e for e in episodes if e["family"] == task]) for task in tasks},
        "overall": summary(episodes),
    }
    partial = output_dir / "results.json.partial"
    partial.write_text(json.dumps(results, indent=2), encoding="utf-8")
    partial.replace(output_dir / "results.json")
    overall = results["overall"]
    return {
        "success_rate": overall["success_rate"],
        "success_low": overall["success_low"],
        "success_high": overall["success_high"],
        **{f"success_{task}": of["success_rate"] for task, of in results["families"].items()},
        "num_episodes": overall["num_episodes"],
        "num_errors": overall["num_errors"],
    }


def suite_options(suite: str, cfg) -> dict:
    """The options that say which world it was, of a suite that has several."""
    return {
        name: getattr(cfg, name)
        for name in ("split", "variant", "action_repeat")
        if name in load_suite(suite).UNDERSTOOD
    }


class TaskEnvs:
    """The environments of one task, kept from batch to batch; one that fails is built anew.

    The first is built at once: a suite that cannot be set up ends the stage, and is no failure of its episodes.
    """

    def __init__(self, cfg, suite: str, task: str) -> None:
        self.cfg, self.suite, self.task = cfg, suite, task
        self._envs: dict[int, SuiteEnv] = {}
        self.state_dim = self.get(0).observation_space["agent_pos"].shape[0]  # type: ignore[index]
        self.action_space = self.get(0).action_space
        self.control_hz = self.get(0).metadata["render_fps"]

    def get(self, slot: int) -> SuiteEnv:
        if slot not in self._envs:
            self._envs[slot] = make_env(self.suite, self.task, self.cfg.image_size, self.cfg)
        return self._envs[slot]

    def discard(self, slot: int) -> None:
        self._envs.pop(slot, None)


def roll_out(policy: Policy | None, cfg, suite: str, batches: list[tuple[str, range]]) -> Iterator[list[dict]]:
    """Records of the batches (task, indices), in their order."""
    if policy is not None:
        envs: TaskEnvs | None = None
        for task, indices in batches:
            if envs is None or envs.task != task:
                envs = TaskEnvs(cfg, suite, task)
            yield roll_out_batch(policy, envs, indices)
        return
    with worker_pool(max(1, min(cfg.num_workers, len(batches)))) as pool:
        jobs = [pool.submit(roll_out_in_worker, cfg, suite, task, indices) for task, indices in batches]
        try:
            for job in jobs:
                yield job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@functools.cache
def policy_of_worker(folder: str, device: str, image_size: int) -> PolicyFolder:
    return PolicyFolder(folder, device, image_size)


# Those of the task that this worker is at.
_envs: list[TaskEnvs] = []


def roll_out_in_worker(cfg, suite: str, task: str, indices: range) -> list[dict]:
    set_num_threads(cfg.runtime.num_threads or max(1, (os.cpu_count() or 1) // cfg.num_workers))
    if not _envs or _envs[0].task != task:
        _envs[:] = [TaskEnvs(cfg, suite, task)]
    return roll_out_batch(policy_of_worker(cfg.policy, cfg.runtime.device, cfg.image_size), _envs[0], indices)


def roll_out_batch(policy: Policy, envs: TaskEnvs, indices: range) -> list[dict]:
    """Run the episodes of `indices` in lockstep until the last one ends; one record each.

    An episode that has ended goes on being shown its last frame, since the policy's queue serves the whole batch.
    An environment that raises ends its own episode only, without success.
    """
    import torch

    cfg, size = envs.cfg, len(indices)
    frames = np.zeros((size, cfg.image_size, cfg.image_size, 3), np.uint8)
    states = np.zeros((size, envs.state_dim), np.float32)
    instructions = [""] * size
    running = np.zeros(size, bool)
    filmed: list[list[np.ndarray]] = [[] for _ in indices]
    records = [
        {
            "family": envs.task,
            "index": index,
            "seed": cfg.seed + index,
            **suite_options(envs.suite, cfg),
            "instruction": "",
            "success": False,
            "steps": 0,
            "return": 0.0,
        }
        for index in indices
    ]

    def see(slot: int, observation: dict) -> None:
        frames[slot], states[slot] = observation["pixels"], observation["agent_pos"]
        if indices[slot] < cfg.num_videos:
            filmed[slot].append(observation["pixels"])

    def fail(slot: int, error: Exception) -> None:
        log.warning("episode %d of %s failed: %s", indices[slot], envs.task, error)
        records[slot]["error"] = f"{type(error).__name__}: {error}"
        running[slot] = False
        envs.discard(slot)

    for slot, record in enumerate(records):
        try:
            observation, info = envs.get(slot).reset(seed=record["seed"])
        except Exception as error:  # any failure of one simulation is that episode's alone
            fail(slot, error)
        else:
            see(slot, observation)
            instructions[slot] = record["instruction"] = info["instruction"]
            running[slot] = True

    # Policies that sample draw from torch's global generator; this makes a batch the same in every run.
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed + indices[0])
        policy.reset()
        while running.any():
            actions = policy.act(frames, states, instructions)
            if actions.shape != (size, *envs.action_space.shape):
                raise ValueError(
                    f"the policy's actions have shape {actions.shape}, expected {(size, *envs.action_space.shape)}"
                )
            for slot in np.flatnonzero(running):
                env, record = envs.get(slot), records[slot]
                action = np.clip(actions[slot], envs.action_space.low, envs.action_space.high)
                try:
                    observation, reward, terminated, truncated, info = env.step(action)
                except Exception as error:  # as above
                    fail(slot, error)
                    continue
                see(slot, observation)
                record["steps"] += 1
                record["return"] += float(reward)
                record["success"] = bool(info["is_success"])
                running[slot] = not (terminated or truncated)

    for slot, index in enumerate(indices):
        if filmed[slot]:
            outcome = "success" if records[slot]["success"] else "failure"
            path = Path(cfg.output_dir).expanduser() / "videos" / f"{envs.task}_{index:03d}_{outcome}.mp4"
            write_captioned_video(path, filmed[slot], instructions[slot], envs.control_hz)
    return records


def read_episodes(path: Path) -> list[dict]:
    """The records written so far; a line cut short by a kill is dropped from the file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)
    return [json.loads(line) for line in lines]


def summary(episodes: list[dict]) -> dict:
    """Success of these episodes; one whose simulator failed counts as no success."""
    num_successes = sum(episode["success"] for episode in episodes)
    low, high = wilson_interval(num_successes, len(episodes))
    return {
        "num_episodes": len(episodes),
        "num_successes": num_successes,
        "success_rate": num_successes / max(len(episodes), 1),
        "success_low": low,
        "success_high": high,
        "mean_steps": float(np.mean([episode["steps"] for episode in episodes])) if episodes else 0.0,
        "num_errors": sum("error" in episode for episode in episodes),
    }


def wilson_interval(num_successes: int, num_trials: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a success rate (Wilson, 1927, "Probable inference")."""
    if num_trials == 0:
        return 0.0, 1.0
    rate = num_successes / num_trials
    centre = rate + z**2 / (2 * num_trials)
    half = z * np.sqrt(rate * (1 - rate) / num_trials + z**2 / (4 * num_trials**2))
    scale = 1 + z**2 / num_trials
    return float(max(0.0, (centre - half) / scale)), float(min(1.0, (centre + half) / scale))
