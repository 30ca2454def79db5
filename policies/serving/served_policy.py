"""A saved LeRobot policy as a function from one checked observation to a chunk of actions in the robot's units."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.constants import ACTION
from lerobot.utils.import_utils import register_third_party_plugins

from policies.lapa.processor_lapa import missing_statistics
from policies.serving.protocol import is_image


def policy_type(folder: str | Path) -> str:
    """The type that a policy folder's config.json names; ValueError where it is no policy."""
    config_file = Path(folder).expanduser() / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if "type" not in config:
        raise ValueError(
            f"{folder} is no LeRobot policy (no config.json with a type): expected a folder written by "
            "`lapa finetune`, lerobot-train or save_pretrained"
        )
    return config["type"]


def refuse_foreign_code(folder: Path) -> None:
    """ValueError where a processor file names a class outside LeRobot, which loading it would import and call."""
    for file in sorted(folder.glob("policy_*processor.json")):
        for step in json.loads(file.read_text(encoding="utf-8")).get("steps", []):
            if "registry_name" not in step and not str(step.get("class", "")).startswith("lerobot."):
                raise ValueError(
                    f"{file} asks for {step.get('class')!r}: only registered steps and classes of lerobot are loaded "
                    "from a policy folder"
                )


def observed(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of what a policy is told: its input features, and the last action where it reads that."""
    features = dict(config.input_features or {})
    if getattr(config, "reads_last_action", False) and config.action_feature is not None:
        features[ACTION] = config.action_feature
    return {name: tuple(feature.shape) for name, feature in features.items()}


class ServedPolicy:
    """A policy folder on a device.

    Attributes:
        inputs: name and shape of each observation that the policy needs, images as (3, H, W), see `observed`.
        action_shape: (T, A) of what `infer` returns.

    Args:
        require_statistics: of all that the policy normalises; without them LeRobot gives it raw numbers, unsaid.

    Raises:
        ValueError: where the folder is no policy, lacks statistics, or the policy remembers earlier observations,
            which one server for several robots cannot do.
    """

    def __init__(self, folder: str | Path, device: torch.device, require_statistics: bool = True) -> None:
        folder = Path(folder).expanduser()
        policy_type(folder)
        refuse_foreign_code(folder)
        register_third_party_plugins()
        config = PreTrainedConfig.from_pretrained(folder)
        if getattr(config, "n_obs_steps", 1) != 1:
            raise ValueError(
                f"n_obs_steps of the policy is {config.n_obs_steps}: only policies that see one observation are served"
            )
        config.device = str(device)
        self.type, self.device = config.type, device
        self.policy = get_policy_class(config.type).from_pretrained(folder, config=config).to(device).eval()
        self.preprocess, self.postprocess = make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": str(device)}},
        )
        steps = [*self.preprocess.steps, *self.postprocess.steps]
        for step in steps if require_statistics else ():
            if not hasattr(step, "norm_map"):  # neither a normaliser nor its inverse
                continue
            for name, missing in missing_statistics(step.features, step.norm_map, step.stats).items():
                raise ValueError(
                    f"{folder} has no statistics {missing} of {name}: the policy would work in wrong units. Save it "
                    "with the processors that its data set's statistics make"
                )
        self.inputs = observed(config)
        assert config.action_feature is not None
        # LeRobot's diffusion policy has no chunk_size: it returns the actions that are executed.
        num_actions = getattr(config, "chunk_size", getattr(config, "n_action_steps", 1))
        self.action_shape = (int(num_actions), int(config.action_feature.shape[0]))

    def batch(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The policy's batch of one for what `protocol.read_observation` returns, preprocessed."""
        batch: dict[str, Any] = {"task": [observation["task"]]}
        for name in self.inputs:
            tensor = torch.from_numpy(np.ascontiguousarray(observation[name])).to(self.device)[None]
            batch[name] = tensor.permute(0, 3, 1, 2).float() / 255 if is_image(name) else tensor
        if ACTION in batch:
            batch[ACTION] = batch[ACTION][:, None]
        return self.preprocess(batch)

    def infer(self, observation: dict[str, Any]) -> np.ndarray:
        """Actions (T, A) float32 for what `protocol.read_observation` returns."""
        with torch.inference_mode():
            chunk_BTA = self.policy.predict_action_chunk(self.batch(observation))
            return self.postprocess(chunk_BTA)[0].float().cpu().numpy()
