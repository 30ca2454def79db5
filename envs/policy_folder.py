"""Any saved LeRobot policy as a function from frames, states and instructions to actions, for a batch."""

import json
from pathlib import Path
from typing import Protocol

import numpy as np

IMAGE_KEY = "observation.images.top"


class Policy(Protocol):
    """What evaluation needs of a policy."""

    def reset(self) -> None:
        """Forget the present episodes."""

    def act(self, frames: np.ndarray, states: np.ndarray, instructions: list[str]) -> np.ndarray:
        """Actions (B, A) for frames (B, H, W, 3) uint8, states (B, S) and B instructions, in the suite's units."""


def refuse_foreign_code(folder: Path) -> None:
    """ValueError where a processor file names a class outside LeRobot, which loading it would import and call."""
    for file in sorted(folder.glob("policy_*processor.json")):
        for step in json.loads(file.read_text(encoding="utf-8")).get("steps", []):
            if "registry_name" not in step and not str(step.get("class", "")).startswith("lerobot."):
                raise ValueError(
                    f"{file} asks for {step.get('class')!r}: only registered steps and classes of lerobot are loaded "
                    "from a policy folder"
                )


def refuse_missing_statistics(folder: Path, steps: list) -> None:
    """ValueError where a normaliser has no numbers for a feature: LeRobot passes it on as it is, without a word."""
    for step in steps:
        if not hasattr(step, "norm_map"):  # neither a normaliser nor its inverse
            continue
        for name, feature in step.features.items():
            mode = step.norm_map.get(feature.type)
            if mode is not None and mode.value != "IDENTITY" and name not in (step.stats or {}):
                raise ValueError(
                    f"{folder} normalises {name} by {mode.value} and has no statistics of it: the policy would work in "
                    "wrong units. Save it with the processors that its data set's statistics make"
                )


class PolicyFolder:
    """A policy saved by LeRobot, with its own pre- and postprocessor.

    The policy keeps one queue of actions for the whole batch, so a batch must start and step together.

    Args:
        folder: holds config.json and model.safetensors, and the processors' files.
        device: auto, cpu, cuda or cuda:N.
        image_size: of the frames that act() will be given, pixels.

    Raises:
        ValueError: where the folder is no policy or lacks statistics, or the policy needs other observations than
            these.
    """

    def __init__(self, folder: str | Path, device: str, image_size: int) -> None:
        import torch
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors
        from lerobot.utils.import_utils import register_third_party_plugins

        folder = Path(folder).expanduser()
        config_file = folder / "config.json"
        if not config_file.is_file() or "type" not in json.loads(config_file.read_text(encoding="utf-8")):
            raise ValueError(
                f"{folder} is no LeRobot policy (no config.json with a type): expected a folder written by "
                "`lapa finetune`, lerobot-train or save_pretrained"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        refuse_foreign_code(folder)
        register_third_party_plugins()
        config = PreTrainedConfig.from_pretrained(folder)
        config.device = device
        self.image_key = find_image_key(config, image_size)
        self.state_shape = config.robot_state_feature.shape if config.robot_state_feature else None
        self.device = torch.device(device)
        self.policy = get_policy_class(config.type).from_pretrained(folder, config=config)
        self.policy.to(self.device).eval()
        self.preprocess, self.postprocess = make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": device}},
        )
        refuse_missing_statistics(folder, [*self.preprocess.steps, *self.postprocess.steps])

    def reset(self) -> None:
        self.policy.reset()

    def act(self, frames: np.ndarray, states: np.ndarray, instructions: list[str]) -> np.ndarray:
        import torch

        if self.state_shape not in (None, states.shape[1:]):
            raise ValueError(
                f"the policy wants states of shape {self.state_shape}, this suite has {states.shape[1:]}: "
                "evaluate it in the suite that it was trained in"
            )
        images = torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2).contiguous().float() / 255
        observation = {
            self.image_key: images,
            "observation.state": torch.from_numpy(states).to(self.device),
            "task": instructions,
        }
        with torch.inference_mode():
            actions = self.postprocess(self.policy.select_action(self.preprocess(observation)))
        return actions.float().cpu().numpy()


def find_image_key(config, image_size: int) -> str:
    """The name under which the policy wants the one camera's frames."""
    features = config.image_features
    if len(features) != 1:
        raise ValueError(f"the policy wants images {sorted(features)}, this suite has one camera, {IMAGE_KEY}")
    ((key, feature),) = features.items()
    if tuple(feature.shape[-2:]) != (image_size, image_size):
        raise ValueError(
            f"image_size is {image_size}, the policy was trained on frames of shape {tuple(feature.shape)}: "
            f"set image_size={feature.shape[-1]}"
        )
    return key
