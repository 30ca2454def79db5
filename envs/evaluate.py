"""`lapa evaluate`: the success of any LeRobot policy in the tabletop suite, on paired initial states.

output_dir/
    episodes.jsonl  one line an episode, written batch by batch: family, index, seed, split, variant, instruction,
                    success, steps, return, and error where the simulator failed
    results.json    success with its 95% Wilson interval, a family and overall
    videos/         the first episodes of every family, with their instruction

Episode i of a family starts from seed cfg.seed + i whatever the policy, so that policies can be compared in pairs.
"""

import json
import logging
from pathlib import Path

import gymnasium
import numpy as np
from tqdm import tqdm

from envs import FAMILIES
from envs.arena import MAX_STEP
from envs.captioned_video import write_captioned_video
from envs.policy_folder import Policy, PolicyFolder
from envs.tabletop import TabletopEnv

log = logging.getLogger(__name__)


def run(cfg) -> dict:
    """Evaluate the policy that `cfg` (lapa.schema.EvaluateConfig) names; goes on where a killed run stopped.

    Returns success_rate, success_low and success_high (95%) overall, success_<family>, num_episodes, num_errors.

    Raises:
        ValueError: for an unknown family, or a policy that does not fit the suite.
    """
    if cfg.runtime.num_threads:
        import torch

        torch.set_num_threads(cfg.runtime.num_threads)
    return evaluate(PolicyFolder(cfg.policy, cfg.runtime.device, cfg.image_size), cfg)


def evaluate(policy: Policy, cfg) -> dict:
    """The same for a policy in memory."""
    unknown = [family for family in cfg.families if family not in FAMILIES]
    if unknown or not cfg.families:
        raise ValueError(f"families is {list(cfg.families)}, expected some of {list(FAMILIES)}")
    output_dir = Path(cfg.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    episodes_path = output_dir / "episodes.jsonl"
    episodes = read_episodes(episodes_path)
    finished = {(episode["family"], episode["index"]) for episode in episodes}

    total = cfg.num_episodes * len(cfg.families)
    with (
        tqdm(total=total, initial=len(finished), desc="evaluate", unit="episode") as bar,
        episodes_path.open("a", encoding="utf-8") as file,
    ):
        for family in cfg.families:
            envs = FamilyEnvs(cfg, family)
            for first in range(0, cfg.num_episodes, cfg.num_envs):
                indices = range(first, min(first + cfg.num_envs, cfg.num_episodes))
                # A batch is done again as a whole: what a policy draws at random depends on its batch.
                if all((family, index) in finished for index in indices):
                    continue
                batch = roll_out_batch(policy, envs, indices, output_dir / "videos")
                file.writelines(json.dumps(e) + "\n" for e in batch if (family, e["index"]) not in finished)
                file.flush()
                bar.update(sum((family, index) not in finished for index in indices))

    episodes = read_episodes(episodes_path)
    results = {
        "policy": str(getattr(cfg, "policy", "")),
        "split": cfg.split,
        "variant": cfg.variant,
        "seed": cfg.seed,
        "families": {family: summary([e for e in episodes if e["family"] == family]) for family in cfg.families},
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
        **{f"success_{family}": of["success_rate"] for family, of in results["families"].items()},
        "num_episodes": overall["num_episodes"],
        "num_errors": overall["num_errors"],
    }


class FamilyEnvs:
    """The environments of one family, kept from batch to batch; one that fails is built anew."""

    def __init__(self, cfg, family: str) -> None:
        self.cfg = cfg
        self.family = family
        self._envs: dict[int, TabletopEnv] = {}

    def get(self, slot: int) -> TabletopEnv:
        if slot not in self._envs:
            env = gymnasium.make(
                FAMILIES[self.family],
                disable_env_checker=True,
                image_size=self.cfg.image_size,
                num_blocks=(self.cfg.num_blocks_min, self.cfg.num_blocks_max),
                split=self.cfg.split,
                variant=self.cfg.variant,
            ).unwrapped
            assert isinstance(env, TabletopEnv)
            self._envs[slot] = env
        return self._envs[slot]

    def discard(self, slot: int) -> None:
        self._envs.pop(slot, None)


def roll_out_batch(policy: Policy, envs: FamilyEnvs, indices: range, video_folder: Path) -> list[dict]:
    """Run the episodes of `indices` in lockstep until the last one ends; one record each.

    An episode that has ended goes on being shown its last frame, since the policy's queue serves the whole batch.
    An environment that raises ends its own episode only, without success.
    """
    import torch

    cfg, size = envs.cfg, len(indices)
    frames = np.zeros((size, cfg.image_size, cfg.image_size, 3), np.uint8)
    states = np.zeros((size, 2), np.float32)
    instructions = [""] * size
    running = np.zeros(size, bool)
    filmed: list[list[np.ndarray]] = [[] for _ in indices]
    records = [
        {
            "family": envs.family,
            "index": index,
            "seed": cfg.seed + index,
            "split": cfg.split,
            "variant": cfg.variant,
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
        log.warning("episode %d of %s failed: %s", indices[slot], envs.family, error)
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
            if actions.shape != (size, 2):
                raise ValueError(f"the policy's actions have shape {actions.shape}, expected {(size, 2)}")
            for slot in np.flatnonzero(running):
                env, record = envs.get(slot), records[slot]
                action = np.clip(actions[slot], -MAX_STEP, MAX_STEP)
                try:
                    observation, reward, terminated, truncated, info = env.step(action)
                except Exception as error:  # as above
                    fail(slot, error)
                    continue
                see(slot, observation)
                record["steps"] += 1
                record["return"] += reward
                record["success"] = bool(info["is_success"])
                running[slot] = not (terminated or truncated)

    for slot, index in enumerate(indices):
        if filmed[slot]:
            outcome = "success" if records[slot]["success"] else "failure"
            path = video_folder / f"{envs.family}_{index:03d}_{outcome}.mp4"
            write_captioned_video(path, filmed[slot], instructions[slot])
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
