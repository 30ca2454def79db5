"""`lapa replay`: proposed actions are carried out in simulation, and become a data set where they prove themselves.

Every episode that `lapa demos` wrote can be begun again from its seed. A proposal names such an episode and gives it
an instruction and a list of candidates, sequences of actions, the preferred one first. The first candidate that ends
where the episode ended, tip and blocks, is recorded anew; where none does, the episode stays as it was. So what was
cut from an episode had no part in what it did.

With a policy, the policy acts instead, as the proposal's instruction tells it, until it comes to rest.

output_dir/
    demos/          LeRobotDataset v3 with the proposals' instructions
    episodes.jsonl  what became of every proposal
    replay.json     the results; written last
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from envs.arena import CONTROL_HZ
from envs.dataset import Shard, read_shard, write_dataset
from envs.shards import EPISODES_PER_SHARD, Episode, ShardOptions, make_env, save_shard
from envs.suites import body_of
from envs.tabletop import TabletopEnv
from envs.tasks import make_task

REST_STEPS = 4  # a policy that moves less than cfg.rest_m within so many steps has finished
SAME_STATE_M = 1e-3  # between a recorded state and the same step simulated again


@dataclass(frozen=True)
class ReplayOptions:
    """What decides what a shard of replayed episodes holds."""

    data: str
    proposals: str
    policy: str | None
    tolerance_m: float
    rest_m: float
    mp4: bool = False


@dataclass(frozen=True)
class Recording:
    """Episodes of `lapa demos`: their environment's options, seeds and families, states and actions."""

    options: ShardOptions
    episodes: list[dict]
    states: list[np.ndarray]  # (T, 2) each
    actions: list[np.ndarray]  # (T, 2) each


def run(cfg) -> dict:
    """Carry out the proposals of `cfg` (lapa.schema.ReplayConfig); goes on where a killed run stopped.

    Returns num_episodes, share_changed (a candidate was accepted, or a policy acted), mean_frames_before and
    mean_frames_after.

    Raises:
        ValueError: where the data cannot be begun again, or a proposal does not fit them.
    """
    output_dir = Path(cfg.output_dir).expanduser()
    recording = read_recording(Path(cfg.data).expanduser())
    proposals = read_proposals(Path(cfg.proposals).expanduser(), len(recording.episodes), cfg.policy is None)
    options = ReplayOptions(cfg.data, cfg.proposals, cfg.policy, cfg.tolerance_m, cfg.rest_m)
    envs: dict[str, TabletopEnv] = {}
    policy = None
    shards: list[Shard] = []
    with tqdm(total=len(proposals), desc="replay", unit="episode") as bar:
        for first in range(0, len(proposals), EPISODES_PER_SHARD):
            part = proposals[first : first + EPISODES_PER_SHARD]
            folder = output_dir / "shards" / f"shard-{first // EPISODES_PER_SHARD:05d}"
            if not folder.is_dir():
                if cfg.policy is not None and policy is None:
                    from envs.policy_folder import PolicyFolder

                    policy = PolicyFolder(cfg.policy, cfg.device, recording.options.image_size)
                made = []
                for offset, proposal in enumerate(part):
                    family = recording.episodes[proposal["episode"]]["family"]
                    if family not in envs:
                        envs[family] = make_env(recording.options, family)
                    if policy is None:
                        episode, fate = carry_out(envs[family], recording, proposal, cfg.tolerance_m)
                    else:
                        episode, fate = act(envs[family], recording, proposal, policy, cfg.rest_m)
                    made.append((first + offset, episode, fate))
                # What became of the proposals first: the shard's folder says that both are complete.
                write_lines(fates_of(folder), [fate for _, _, fate in made])
                body = body_of(recording.options.suite, envs[family])
                save_shard(folder, options, body, [(index, episode) for index, episode, _ in made], [])
            shards.append(read_shard(folder, options))
            bar.update(len(part))

    if not (output_dir / "demos").is_dir():
        write_dataset(output_dir / "demos", shards, recording.options.image_size, with_actions=True)
    fates = [fate for shard in shards for fate in read_lines(fates_of(shard.folder))]
    write_lines(output_dir / "episodes.jsonl", fates)
    results = {
        "num_episodes": len(fates),
        "share_changed": float(np.mean([fate["candidate"] != "original" for fate in fates])),
        "mean_frames_before": float(np.mean([fate["num_frames_before"] for fate in fates])),
        "mean_frames_after": float(np.mean([fate["num_frames"] for fate in fates])),
    }
    write_text(output_dir / "replay.json", json.dumps(results, indent=2) + "\n")
    shutil.rmtree(output_dir / "shards")
    return results


def read_recording(folder: Path) -> Recording:
    """What `lapa demos` left in `folder`; ValueError where that is not its output_dir."""
    import pyarrow.parquet as pq

    for name in ("demos.json", "episodes.jsonl", "demos/data"):
        if not (folder / name).exists():
            raise ValueError(f"no {name} in {folder}: data must be the output_dir of `lapa demos`, which keeps seeds")
    options = json.loads((folder / "demos.json").read_text(encoding="utf-8"))["options"]
    options.pop("video", None)
    if options.get("suite", "tabletop") != "tabletop":
        raise ValueError(f"{folder} holds demonstrations of {options['suite']}: only those of tabletop can be replayed")
    options |= {"families": tuple(options["families"]), "num_blocks": tuple(options["num_blocks"])}
    columns = ["episode_index", "observation.state", "action"]
    tables = [pq.read_table(path, columns=columns) for path in sorted((folder / "demos" / "data").rglob("*.parquet"))]
    episode_of_row = np.concatenate([table["episode_index"].to_numpy() for table in tables])
    states, actions = (
        np.array([row for table in tables for row in table[name].to_pylist()], np.float32) for name in columns[1:]
    )
    starts = np.flatnonzero(np.diff(episode_of_row)) + 1
    return Recording(
        ShardOptions(**options),
        read_lines(folder / "episodes.jsonl"),
        np.split(states, starts),
        np.split(actions, starts),
    )


def read_proposals(path: Path, num_episodes: int, need_candidates: bool) -> list[dict]:
    """One line each: {"episode": row of the data set, "instruction": text, "candidates": [[[dx, dy], ...], ...]}."""
    if not path.is_file():
        raise ValueError(f"no file {path}: expected proposals such as `lapa hindsight` writes")
    proposals = read_lines(path)
    for number, proposal in enumerate(proposals, 1):
        if not 0 <= proposal.get("episode", -1) < num_episodes or not proposal.get("instruction"):
            raise ValueError(
                f"line {number} of {path} is {str(proposal)[:80]!r}: expected an episode below {num_episodes} and an "
                "instruction"
            )
        if need_candidates and "candidates" not in proposal:
            raise ValueError(f"line {number} of {path} has no candidates, and there is no policy= that could act")
    if not proposals:
        raise ValueError(f"{path} holds no proposals")
    return proposals


def carry_out(env: TabletopEnv, recording: Recording, proposal: dict, tolerance_m: float) -> tuple[Episode, dict]:
    """The first candidate that ends where the episode ended, else the episode itself; and what became of it."""
    index = proposal["episode"]
    source, actions = recording.episodes[index], recording.actions[index]
    end, states = end_state(env, source["seed"], actions)
    drift = float(np.abs(states - recording.states[index]).max())
    if drift > SAME_STATE_M:
        raise ValueError(
            f"episode {index} does not repeat: its states are off by {drift:.4f} m from those recorded. The data were "
            "made by another version of the simulation: run `lapa demos` again"
        )
    chosen, deviation, deviations = "original", 0.0, []
    for number, candidate in enumerate(np.asarray(actions) for actions in proposal["candidates"]):
        if not 0 < len(candidate) < len(actions):
            continue
        there, _ = end_state(env, source["seed"], candidate)
        deviations.append(float(np.linalg.norm(there - end, axis=1).max()))
        if deviations[-1] <= tolerance_m:
            chosen, deviation, actions = str(number), deviations[-1], candidate
            break
    episode = record(env, source, proposal["instruction"], lambda observation, step: step_of(actions, step))
    return episode, fate_of(proposal, source, recording, episode, chosen) | {
        "deviation_m": deviation,
        "deviations_m": deviations,
    }


def act(env: TabletopEnv, recording: Recording, proposal: dict, policy, rest_m: float) -> tuple[Episode, dict]:
    """The policy's own way to do what the proposal's instruction says, from the episode's start."""
    source = recording.episodes[proposal["episode"]]
    instruction = proposal["instruction"]
    policy.reset()
    longest = make_task(source["family"]).episode_length
    visited: list[np.ndarray] = []
    rests = False

    def choose(observation: dict, step: int) -> np.ndarray | None:
        nonlocal rests
        visited.append(observation["agent_pos"])
        rests = step > REST_STEPS and bool(np.linalg.norm(visited[-1] - visited[-1 - REST_STEPS]) < rest_m)
        if rests or step >= longest:
            return None
        return policy.act(observation["pixels"][None], observation["agent_pos"][None], [instruction])[0]

    episode = record(env, source, instruction, choose)
    if rests:
        # Steps in which nothing happened any more are no part of what it did.
        episode = replace(
            episode,
            frames=episode.frames[:-REST_STEPS],
            states=episode.states[:-REST_STEPS],
            actions=episode.actions[:-REST_STEPS],
        )
    return episode, fate_of(proposal, source, recording, episode, "policy")


def step_of(actions: np.ndarray, step: int) -> np.ndarray | None:
    return actions[step] if step < len(actions) else None


def end_state(env: TabletopEnv, seed: int, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tip and blocks (1 + n, 2) after the actions (T, 2), metres; and the tip (T, 2) before each of them."""
    observe_pixels, env.observe_pixels = env.observe_pixels, False
    try:
        observation, _ = env.reset(seed=seed)
        states = []
        for action in actions:
            states.append(observation["agent_pos"])
            observation, *_ = env.step(action)
    finally:
        env.observe_pixels = observe_pixels
    scene = env.scene
    return np.concatenate([scene.tip_xy[None], scene.blocks_xy]), np.array(states)


def record(env: TabletopEnv, source: dict, instruction: str, choose) -> Episode:
    """An episode from the source's seed: choose(observation, step) gives an action (2,), or None to end."""
    observation, _ = env.reset(seed=source["seed"])
    frames, states = [], []
    actions: list[np.ndarray] = []
    while (action := choose(observation, len(actions))) is not None:
        frames.append(observation["pixels"])
        states.append(observation["agent_pos"])
        observation, _, _, _, info = env.step(action)
        actions.append(info["executed_action"])
    return Episode(
        np.stack(frames), np.stack(states), np.stack(actions), instruction, source["family"], source["seed"], 0
    )


def fate_of(proposal: dict, source: dict, recording: Recording, episode: Episode, candidate: str) -> dict:
    return {
        "episode": proposal["episode"],
        "seed": source["seed"],
        "instruction": proposal["instruction"],
        "candidate": candidate,
        "num_frames_before": len(recording.actions[proposal["episode"]]),
        "num_frames": len(episode.frames),
        "seconds_saved": (len(recording.actions[proposal["episode"]]) - len(episode.frames)) / CONTROL_HZ,
    }


def fates_of(shard_folder: Path) -> Path:
    return shard_folder.with_name(f"{shard_folder.name}.fates.jsonl")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
