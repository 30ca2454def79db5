"""Expert episodes, rolled out and encoded in shards: what `envs.demos` hands to its worker processes.

A shard is a folder with one video of all its episodes, one after the other, and what happened in them. It appears
under its name only when it is complete, and depends on nothing but the options and its number: a run that was
killed goes on with the shards that are missing. This file imports neither torch nor LeRobot, which take longer to
load than a shard takes to render.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from envs import suites
from envs.suites import Body, SuiteEnv, body_of

EPISODES_PER_SHARD = 25
ATTEMPTS = 10
# Far from the evaluation's seeds too, for up to a million episodes.
ATTEMPT_STRIDE = 100_000_000
NOISE_STREAM, PLAY_STREAM = 1, 2

# Full chroma: at 64 pixels yuv420p smears the blocks' colours (30 dB against 45 dB, measured).
PIXEL_FORMAT = "yuv444p"
CRF = 12
KEYFRAME_INTERVAL = 4
PRESET = "veryfast"


@dataclass(frozen=True)
class ShardOptions:
    """The options of `lapa demos` that decide what a shard holds; only one of the two kinds of noise is not 0."""

    families: tuple[str, ...]  # tasks of the suite
    num_episodes: int
    seed: int
    split: str
    image_size: int
    num_blocks: tuple[int, int]
    variant: str
    action_noise_m: float
    mp4: bool
    play: bool = False
    suite: str = "tabletop"
    action_noise_share: float = 0.0  # of half the range of each action
    action_repeat: int = 0

    @property
    def num_blocks_min(self) -> int:
        return self.num_blocks[0]

    @property
    def num_blocks_max(self) -> int:
        return self.num_blocks[1]

    @property
    def num_shards(self) -> int:
        return -(-self.num_episodes // EPISODES_PER_SHARD)


@dataclass
class Episode:
    """One successful episode. Step t: the frame and state seen, and the action executed from there."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    states: np.ndarray  # (T, S) float32
    actions: np.ndarray  # (T, A) float32
    instruction: str
    family: str
    seed: int  # of the attempt that succeeded
    num_failures: int


def record_episode(env: Any, seed: int, action_noise: float | np.ndarray, play: bool = False) -> Episode | None:
    """Let the expert of a SuiteEnv act under Gaussian noise; None where it never succeeds.

    action_noise: standard deviation, of all actions or of each (A,), in the action's units.
    play: it dawdles on its way (`envs.play`; tabletop). A failed attempt is repeated from seed + k * ATTEMPT_STRIDE.
    """
    for attempt in range(ATTEMPTS):
        attempt_seed = seed + attempt * ATTEMPT_STRIDE
        rng = np.random.default_rng([NOISE_STREAM, attempt_seed])
        dawdler = make_dawdler(np.random.default_rng([PLAY_STREAM, attempt_seed])) if play else None
        observation, info = env.reset(seed=attempt_seed)
        frames, states, actions = [], [], []
        success = done = False
        while not done:
            action = env.expert_action()
            if dawdler is not None:
                action = dawdler(env.scene.tip_xy, action)
            noisy = action + rng.normal(0.0, action_noise, action.shape)
            frames.append(observation["pixels"])
            states.append(observation["agent_pos"])
            observation, _, terminated, truncated, step_info = env.step(noisy)
            actions.append(step_info["executed_action"])
            success, done = step_info["is_success"], terminated or truncated
        if success:
            return Episode(
                np.stack(frames),
                np.stack(states),
                np.stack(actions),
                info["instruction"],
                env.task,
                attempt_seed,
                attempt,
            )
    return None


def make_dawdler(rng: np.random.Generator):
    """Play of the tabletop, the one suite that has it."""
    from envs.arena import MAX_STEP
    from envs.play import Dawdler

    return Dawdler(rng, MAX_STEP)


def encode_video(path: Path, episodes: list[np.ndarray], fps: int) -> None:
    """Write episodes of frames (T, H, W, 3) uint8 one after the other, each opening with a key frame."""
    height, width = episodes[0].shape[1:3]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, PIXEL_FORMAT
        stream.codec_context.thread_count = 1
        stream.options = {
            "crf": str(CRF),
            "preset": PRESET,
            "g": str(KEYFRAME_INTERVAL),
            "bf": "0",
            "forced-idr": "1",
        }
        for frames in episodes:
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if index == 0:
                    frame.pict_type = av.video.frame.PictureType.I
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_env(options: ShardOptions, task: str) -> Any:
    """The SuiteEnv that the options mean."""
    return suites.make_env(options.suite, task, options.image_size, options)


# One environment a task and a process: building one costs more than an episode.
_envs: dict[tuple[ShardOptions, str], SuiteEnv] = {}


def write_shard(folder: Path, options: ShardOptions, number: int) -> int:
    """Roll out and write shard `number`; returns how many episodes it holds."""
    first = number * EPISODES_PER_SHARD
    episodes, skipped = [], []
    for index in range(first, min(first + EPISODES_PER_SHARD, options.num_episodes)):
        task = options.families[index % len(options.families)]
        if (options, task) not in _envs:
            _envs[options, task] = make_env(options, task)
        env = _envs[options, task]
        half_range = (env.action_space.high - env.action_space.low).astype(np.float64) / 2
        action_noise = options.action_noise_m + options.action_noise_share * half_range
        episode = record_episode(env, options.seed + index, action_noise, options.play)
        if episode is None:
            skipped.append({"family": task, "seed": options.seed + index, "attempts": ATTEMPTS})
        else:
            episodes.append((index, episode))
    save_shard(folder, options, body_of(options.suite, env), episodes, skipped)
    return len(episodes)


def save_shard(folder: Path, options, body: Body, episodes: list[tuple[int, Episode]], skipped: list[dict]) -> None:
    """Write episodes with their indices as the shard `folder`, which appears when it is complete.

    options: the dataclass they were made with, which `envs.dataset.read_shard` will ask for; options.mp4 adds a file
    an episode.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if episodes:
        encode_video(partial / "frames.mp4", [episode.frames for _, episode in episodes], body.control_hz)
        np.savez(
            partial / "steps.npz",
            states=np.concatenate([episode.states for _, episode in episodes]),
            actions=np.concatenate([episode.actions for _, episode in episodes]),
            lengths=np.array([len(episode.frames) for _, episode in episodes]),
            # A sample of pixels, for the data set's statistics: 4 frames, every other row and column.
            pixels=np.stack([pixel_sample(episode.frames) for _, episode in episodes]),
        )
        if options.mp4:
            for index, episode in episodes:
                encode_video(partial / f"episode_{index:06d}.mp4", [episode.frames], body.control_hz)
    rows = [
        {
            "index": index,
            "family": episode.family,
            "seed": episode.seed,
            "instruction": episode.instruction,
            "num_failures": episode.num_failures,
        }
        for index, episode in episodes
    ]
    summary = {"options": asdict(options), "body": asdict(body), "episodes": rows, "skipped": skipped}
    (partial / "shard.json").write_text(json.dumps(summary), encoding="utf-8")
    partial.replace(folder)


def pixel_sample(frames: np.ndarray) -> np.ndarray:
    """(4 * H/2 * W/2, 3) uint8 pixels from frames (T, H, W, 3)."""
    times = np.linspace(0, len(frames) - 1, 4).round().astype(int)
    return frames[times, ::2, ::2].reshape(-1, 3)
