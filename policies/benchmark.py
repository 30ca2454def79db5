"""How long a policy takes, beside LeRobot's own, with random weights and equal images.

    python -m policies.benchmark                              the tabletop policy, ACT, diffusion policy, SmolVLA
    python -m policies.benchmark --policy path/to/folder      a saved policy in place of the first
    python -m policies.benchmark --others act                 some of the others

All policies take turns in one process, one chunk each a round, so that what else the machine does meets all of them
alike; slow ones sit out most rounds. A step is what a control loop waits for: preprocessing, `select_action` and
postprocessing for one observation. The first step of a chunk computes it, the others take from the queue; all policies
act for equally many steps a chunk. ACT and the diffusion policy have LeRobot's default sizes, SmolVLA the published
ones (450 M), with a made-up tokenizer and without enlarging the image to 512 pixels. `exported` is the first policy by
`lapa export`. A policy whose extra is not installed is left out, with the command that installs it.
"""

import argparse
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE
from tqdm import tqdm

import lerobot_policy_lapa  # noqa: F401  registers our policy
from lapa.checkpoint import write_json
from lapa.schema import ExportConfig
from policies import export
from policies.serving.onnx_policy import OnnxPolicy
from policies.serving.served_policy import ServedPolicy

CAMERA = "observation.images.top"
TASK = "move to the red moon"
# A policy whose first chunk took longer takes part in few rounds.
SLOW_S, SLOW_EVERY = 1.0, 20


def features(image_size: int, action_dim: int = 2) -> dict[str, dict[str, PolicyFeature]]:
    """One camera, a state and an action of two numbers, as in the tabletop suite."""
    return {
        "input_features": {
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size)),
            OBS_STATE: PolicyFeature(FeatureType.STATE, (action_dim,)),
        },
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,))},
    }


def statistics(image_size: int, action_dim: int = 2) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics under which normalising changes nothing much."""
    numbers = {"mean": torch.zeros(action_dim), "std": torch.ones(action_dim)}
    numbers |= {"min": -torch.ones(action_dim), "max": torch.ones(action_dim)}
    image = {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.25)}
    return {OBS_STATE: numbers, ACTION: numbers, CAMERA: image}


def random_policy(name: str, image_size: int, options: dict[str, Any], folder: Path) -> Path:
    """A policy folder with random weights, of LeRobot's default sizes where the options do not say otherwise."""
    config = make_policy_config(name, device="cpu", push_to_hub=False, **features(image_size), **options)
    torch.manual_seed(0)
    policy = get_policy_class(name)(config)
    before, after = make_pre_post_processors(config, dataset_stats=statistics(image_size))
    for part in (policy, before, after):
        part.save_pretrained(folder)
    return folder


def random_smolvlm(folder: Path) -> Path:
    """The description of SmolVLM2-500M cut to 16 layers, as SmolVLA uses it, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers: Any = import_module("transformers")  # it loads its classes when asked, which type checkers do not see
    names = ("image", "fake_image", "global_image", "end_of_utterance", "video")
    marks = {f"{name}_token": f"<{name}>" for name in names}
    words = ["<unk>", "<pad>", *marks.values(), *TASK.split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=marks
    )
    images, videos = transformers.SmolVLMImageProcessor(), transformers.SmolVLMVideoProcessor()
    transformers.SmolVLMProcessor(images, fast, videos).save_pretrained(folder)
    text = {"model_type": "llama", "vocab_size": 49280, "hidden_size": 960, "intermediate_size": 2560}
    text |= {"num_hidden_layers": 16, "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64}
    vision = {"model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    vision |= {"num_attention_heads": 12, "patch_size": 16, "image_size": 512}
    config = transformers.SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=words.index("<image>"), pad_token_id=1
    )
    config.save_pretrained(folder)
    return folder


def smolvla_options(folder: Path, image_size: int) -> dict[str, Any]:
    return {"vlm_model_name": str(random_smolvlm(folder)), "resize_imgs_with_padding": (image_size, image_size)}


# The row, the policy's type, its options given a folder for what they need and the image size, and the extra it needs.
# No option may let a policy download weights. One frame is observed, as our policy does.
NO_DOWNLOAD = {"pretrained_backbone_weights": None, "n_obs_steps": 1}
LEROBOT_POLICIES: dict[str, tuple[str, Callable[[Path, int], dict[str, Any]], str]] = {
    "act": ("act", lambda folder, image_size: NO_DOWNLOAD, "lerobot"),
    "diffusion": ("diffusion", lambda folder, image_size: NO_DOWNLOAD, "lerobot[diffusion]"),
    "diffusion_ddim10": (
        "diffusion",
        lambda folder, image_size: NO_DOWNLOAD | {"noise_scheduler_type": "DDIM", "num_inference_steps": 10},
        "lerobot[diffusion]",
    ),
    "smolvla": ("smolvla", smolvla_options, "lerobot[smolvla]"),
}


@dataclass(frozen=True)
class Runner:
    """A policy as a control loop sees it: `reset()` begins a new chunk, `step(observation)` gives an action."""

    reset: Callable[[], None]
    step: Callable[[dict[str, Any]], Any]
    inputs: dict[str, tuple[int, ...]]
    chunk_size: int
    num_parameters: int


def eager_runner(served: ServedPolicy, num_steps: int) -> Runner:
    """LeRobot's way, with `num_steps` actions of each chunk."""
    policy = served.policy
    policy.config.n_action_steps = num_steps
    policy.reset()

    def step(observation: dict[str, Any]) -> torch.Tensor:
        with torch.inference_mode():
            return served.postprocess(policy.select_action(served.batch(observation)))

    return Runner(
        policy.reset, step, served.inputs, served.action_shape[0], sum(p.numel() for p in policy.parameters())
    )


def exported_runner(exported: OnnxPolicy, num_steps: int, num_parameters: int) -> Runner:
    """The same of an exported policy."""
    queue: deque[np.ndarray] = deque()

    def step(observation: dict[str, Any]) -> np.ndarray:
        if not queue:
            queue.extend(exported.infer(observation)[:num_steps])
        return queue.popleft()

    return Runner(queue.clear, step, exported.inputs, exported.action_shape[0], num_parameters)


def random_observation(inputs: dict[str, tuple[int, ...]], generator: np.random.Generator) -> dict[str, Any]:
    """A picture from each camera, and a robot at its mean."""
    observation: dict[str, Any] = {"task": TASK}
    for name, shape in inputs.items():
        if len(shape) == 3:
            observation[name] = generator.integers(0, 256, (*shape[1:], 3), dtype=np.uint8)
        else:
            observation[name] = np.zeros(shape, np.float32)
    return observation


def measure(runners: dict[str, Runner], num_rounds: int, num_steps: int) -> dict[str, np.ndarray]:
    """Seconds of each step (num_rounds, num_steps) of each policy, taking turns; NaN in rounds that it sat out."""
    generator = np.random.default_rng(0)

    def chunk(runner: Runner) -> list[float]:
        runner.reset()
        seconds = []
        for _ in range(num_steps):
            observation = random_observation(runner.inputs, generator)
            started = time.perf_counter()
            runner.step(observation)
            seconds.append(time.perf_counter() - started)
        return seconds

    slow = {name for name, runner in runners.items() if max(chunk(runner)) > SLOW_S}
    seconds = {name: np.full((num_rounds, num_steps), np.nan) for name in runners}
    for index in tqdm(range(num_rounds), desc="rounds"):
        for name, runner in runners.items():
            if name not in slow or index % SLOW_EVERY == 0:
                seconds[name][index] = chunk(runner)
    return seconds


def summary(seconds: dict[str, np.ndarray], first: str) -> dict[str, dict[str, float]]:
    """Milliseconds of a step that computes a chunk and of any step, and the median round's ratio to the first policy's.

    A ratio is of one round's chunks, which were computed one right after the other.
    """
    return {
        name: {
            "chunk_p50_ms": float(np.nanquantile(values[:, 0], 0.5) * 1000),
            "chunk_p99_ms": float(np.nanquantile(values[:, 0], 0.99) * 1000),
            "step_p50_ms": float(np.nanquantile(values, 0.5) * 1000),
            "step_p99_ms": float(np.nanquantile(values, 0.99) * 1000),
            "times_the_first": float(np.nanmedian(values[:, 0] / seconds[first][:, 0])),
        }
        for name, values in seconds.items()
    }


def table(numbers: dict[str, dict[str, float]]) -> str:
    """Markdown, a row a policy."""
    lines = [
        "| policy | parameters | actions a chunk | chunk p50, ms | chunk p99, ms | step p50, ms | step p99, ms "
        "| chunk, times the first |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {name} | {row['num_parameters'] / 1e6:.1f} M | {row['chunk_size']:.0f} | {row['chunk_p50_ms']:.1f} "
        f"| {row['chunk_p99_ms']:.1f} | {row['step_p50_ms']:.1f} | {row['step_p99_ms']:.1f} "
        f"| {row['times_the_first']:.2f} |"
        for name, row in numbers.items()
    ]
    return "\n".join(lines)


def build_runners(
    policy: str | None, others: list[str], image_size: int, device: torch.device, folder: Path
) -> tuple[dict[str, Runner], int]:
    """The policies that can be built here, ours first, and the steps of a chunk that each of them acts."""
    ours = ServedPolicy(policy or random_policy("lapa", image_size, {}, folder / "lapa"), device)
    num_steps = int(ours.policy.config.n_action_steps)
    runners = {"lapa": eager_runner(ours, num_steps)}
    for name in others:
        try:
            if name == "exported":
                (folder / name).mkdir()
                export.run(ExportConfig(str(folder / name), policy or str(folder / "lapa")))
                exported = OnnxPolicy(folder / name, torch.get_num_threads())
                runners[name] = exported_runner(exported, num_steps, runners["lapa"].num_parameters)
                continue
            kind, options, extra = LEROBOT_POLICIES[name]
            made = random_policy(kind, image_size, options(folder / f"{name}_parts", image_size), folder / name)
            runners[name] = eager_runner(ServedPolicy(made, device), num_steps)
        except ImportError as error:
            print(f"{name} is left out: {error}" + ("" if name == "exported" else f"; pip install '{extra}'"))
    return runners, num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = ["exported", *LEROBOT_POLICIES]
    parser.add_argument("--policy", help="a saved policy folder; default: the tabletop policy with random weights")
    parser.add_argument("--others", nargs="*", default=known, choices=known, help="beside it; default: all")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="write the numbers as JSON")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        runners, num_steps = build_runners(
            given.policy, given.others, given.image_size, torch.device(given.device), Path(scratch)
        )
        numbers = summary(measure(runners, given.rounds, num_steps), "lapa")
    for name, runner in runners.items():
        numbers[name] |= {"num_parameters": runner.num_parameters, "chunk_size": runner.chunk_size}
    print(table(numbers))
    if given.output:
        write_json(Path(given.output), {"threads": torch.get_num_threads(), "policies": numbers})
    else:
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
