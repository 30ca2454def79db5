"""How long a policy takes for a chunk of actions, beside LeRobot's own, with random weights and equal images.

    python -m policies.benchmark                              the tabletop policy, ACT
    python -m policies.benchmark --policy path/to/folder      a saved policy in place of the first

All policies take turns in one process, one chunk each a round, so that what else the machine does meets all of them
alike. A chunk is preprocessing, the network and postprocessing, for one observation. ACT has LeRobot's default size. A
policy whose extra is not installed is left out, with the command that installs it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
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
from policies.serving.served_policy import ServedPolicy

CAMERA = "observation.images.top"
NUM_WARM_UP = 3


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
    """A policy folder with LeRobot's default sizes and random weights."""
    config = make_policy_config(name, device="cpu", push_to_hub=False, **features(image_size), **options)
    torch.manual_seed(0)
    policy = get_policy_class(name)(config)
    before, after = make_pre_post_processors(config, dataset_stats=statistics(image_size))
    for part in (policy, before, after):
        part.save_pretrained(folder)
    return folder


# Options that keep a policy from downloading weights, and the extra it needs.
LEROBOT_POLICIES: dict[str, tuple[dict[str, Any], str]] = {
    "act": ({"pretrained_backbone_weights": None}, "lerobot"),
}


def chunk_function(policy: ServedPolicy, image_size: int) -> Callable[[], np.ndarray]:
    """A function that asks the policy for a chunk, each time for another picture."""
    generator = np.random.default_rng(0)

    def ask() -> np.ndarray:
        frame = generator.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
        state = {name: np.zeros(shape, np.float32) for name, shape in policy.inputs.items() if len(shape) == 1}
        cameras = {name: frame for name, shape in policy.inputs.items() if len(shape) == 3}
        return policy.infer({"task": "move to the red moon", **state, **cameras})

    return ask


def measure(asks: dict[str, Callable[[], Any]], num_rounds: int) -> dict[str, np.ndarray]:
    """Seconds a chunk (num_rounds,) of each policy, taking turns."""
    for ask in asks.values():
        for _ in range(NUM_WARM_UP):
            ask()
    seconds: dict[str, list[float]] = {name: [] for name in asks}
    for _ in tqdm(range(num_rounds), desc="rounds"):
        for name, ask in asks.items():
            started = time.perf_counter()
            ask()
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def summary(seconds: dict[str, np.ndarray], first: str) -> dict[str, dict[str, float]]:
    """Milliseconds a chunk, and how many times the first policy's the median round took."""
    return {
        name: {
            "p50_ms": float(np.quantile(values, 0.5) * 1000),
            "p99_ms": float(np.quantile(values, 0.99) * 1000),
            "times_the_first": float(np.median(values / seconds[first])),
        }
        for name, values in seconds.items()
    }


def table(numbers: dict[str, dict[str, float]]) -> str:
    """Markdown, a row a policy."""
    lines = ["| policy | parameters | actions a chunk | p50, ms | p99, ms | times the first |", "|---" * 6 + "|"]
    lines += [
        f"| {name} | {row['num_parameters'] / 1e6:.1f} M | {row['chunk_size']:.0f} | {row['p50_ms']:.1f} "
        f"| {row['p99_ms']:.1f} | {row['times_the_first']:.2f} |"
        for name, row in numbers.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", help="a saved policy folder; default: the tabletop policy with random weights")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="write the numbers as JSON")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    policies: dict[str, ServedPolicy] = {}
    with tempfile.TemporaryDirectory() as scratch:
        ours = given.policy or random_policy("lapa", given.image_size, {}, Path(scratch) / "lapa")
        policies["lapa"] = ServedPolicy(ours, device)
        for name, (options, extra) in LEROBOT_POLICIES.items():
            try:
                folder = random_policy(name, given.image_size, options, Path(scratch) / name)
            except ImportError as error:
                print(f"{name} is left out: pip install '{extra}' ({error})")
                continue
            policies[name] = ServedPolicy(folder, device)
        seconds = measure({n: chunk_function(p, given.image_size) for n, p in policies.items()}, given.rounds)
    numbers = summary(seconds, "lapa")
    for name, policy in policies.items():
        numbers[name]["num_parameters"] = sum(p.numel() for p in policy.policy.parameters())
        numbers[name]["chunk_size"] = policy.action_shape[0]
    print(table(numbers))
    if given.output:
        write_json(Path(given.output), {"threads": torch.get_num_threads(), "policies": numbers})
    else:
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
