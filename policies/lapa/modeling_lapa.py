"""The LAPA policy: image and instruction to action chunks, behind LeRobot's policy interface.

Shapes: B batch, C channels, H W pixels, T chunk size, A action dimensions, P state dimensions.
"""

from collections import deque
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from lapa import schema
from lapa.latent_vla.heads import build_action_head
from lapa.latent_vla.model import StateToken, VisionLanguageTrunk, build_action_model, build_trunk
from lapa.trainer import parameter_groups
from policies.lapa.configuration_lapa import LapaConfig
from policies.lapa.real_time import blend_chunks
from policies.lapa.relative_actions import build_relative_actions

P = TypeVar("P", bound="LapaPolicy")


class LapaPolicy(PreTrainedPolicy):
    """Latent action pretraining's policy (arXiv 2410.11758).

    A batch holds images (B, C, H, W) in [0, 1] under the configured key, `task`: B strings, with config.use_state
    `observation.state` (B, P), normalised, and in training `action` (B, T, A), normalised, with `action_is_pad` (B, T).
    Where config.reads_last_action, `action` has one row more, the action before the chunk, at its beginning.

    Args:
        trunk: one that policies of several robots share; None: a new one, as the configuration says.
    """

    config_class = LapaConfig
    name = "lapa"
    _fsdp_wrap_modules = ["Block"]

    def __init__(
        self,
        config: LapaConfig,
        dataset_stats: Any = None,
        dataset_meta: Any = None,
        trunk: VisionLanguageTrunk | None = None,
        **kwargs: Any,
    ):
        super().__init__(config)
        config.validate_features()
        assert config.action_feature is not None
        self.config: LapaConfig = config
        backbone = schema.from_dict("backbone", config.backbone)
        text = schema.from_dict("text", config.text)
        if trunk is None:
            trunk = build_trunk(backbone, text, config.image_tokenizer, config.image_size)
        # As built: a model of transformers then needs its folder no more.
        config.backbone = asdict(trunk.backbone.config)
        head = build_action_head(
            config.action_head,
            trunk.width,
            config.chunk_size,
            config.action_feature.shape[0],
            config.num_bins,
            config.num_sampling_steps,
        )
        state_token = None
        if config.use_state:
            assert config.robot_state_feature is not None
            state_token = StateToken(config.robot_state_feature.shape[0], trunk.width, config.state_dropout)
        self.model = build_action_model(trunk, head, state_token)
        self.relative_actions = build_relative_actions(config) if config.relative_actions else None
        if self.relative_actions is not None and dataset_stats:
            self.relative_actions.fit(dataset_stats)
        self.reset()

    @classmethod
    def from_pretrained(cls: type[P], pretrained_name_or_path, *, strict: bool = True, **kwargs: Any) -> P:
        """Load a policy folder; weights that do not fit are an error, as half-loaded ones act at random."""
        return super().from_pretrained(pretrained_name_or_path, strict=strict, **kwargs)

    def get_optim_params(self) -> list[dict]:
        return parameter_groups(self, self.config.optimizer_weight_decay)

    def reset(self) -> None:
        """Forget the rest of the chunk and the last action: call it when an episode begins."""
        self._action_queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)
        self._last_action: Tensor | None = None

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Loss, a scalar or with reduction="none" one a sample (B,), and numbers to log."""
        images_BCHW, ids_BW, state_BP = self._inputs(batch)
        actions_BTA = batch[ACTION]
        is_pad_BT = batch.get("action_is_pad")
        if is_pad_BT is None:
            is_pad_BT = torch.zeros(actions_BTA.shape[:2], dtype=torch.bool, device=actions_BTA.device)
        if self.relative_actions is not None and state_BP is not None:
            last_BA = has_last_B = None
            if self.config.reads_last_action:
                last_BA, has_last_B = actions_BTA[:, 0], ~is_pad_BT[:, 0]
                actions_BTA, is_pad_BT = actions_BTA[:, 1:], is_pad_BT[:, 1:]
            place_B1A = self.relative_actions.place(state_BP, last_BA, has_last_B)
            actions_BTA = self.relative_actions.distances(actions_BTA, place_B1A)
        loss_B, numbers = self.model.loss(images_BCHW, ids_BW, actions_BTA, is_pad_BT, state_BP)
        to_log = {name: float(value) for name, value in numbers.items()}
        if reduction == "none":
            return loss_B, to_log
        return loss_B.mean(), to_log

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        generator: torch.Generator | None = None,
        inference_delay: int = 0,
        prev_chunk_left_over: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Normalised actions (B, T, A); the postprocessor brings them to metres or radians.

        Args:
            generator: on the CPU, for heads that sample; None: the same observation gives the same chunk.
            inference_delay, prev_chunk_left_over: of real-time chunking, see `blend_chunks`.

        Where config.reads_last_action, the last action is `action` of the batch (B, 1, A), or what real-time chunking
        is about to do, or what `select_action` returned last.
        """
        self.eval()
        images_BCHW, ids_BW, state_BP = self._inputs(batch)
        chunk_BTA = self.model.decode(images_BCHW, ids_BW, generator, state_BP)
        if self.relative_actions is not None and state_BP is not None:
            place_B1A = self.relative_actions.place(state_BP, self._find_last_action(batch, prev_chunk_left_over))
            chunk_BTA = self.relative_actions.actions(chunk_BTA, place_B1A)
        return blend_chunks(chunk_BTA, prev_chunk_left_over, inference_delay)

    def supports_rtc(self) -> bool:
        """Whether LeRobot's real-time chunking may run this policy."""
        return True

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next normalised action (B, A), from a new chunk whenever n_action_steps of the last are used up."""
        if not self._action_queue:
            chunk_BTA = self.predict_action_chunk(batch, **kwargs)
            self._action_queue.extend(chunk_BTA[:, : self.config.n_action_steps].transpose(0, 1))
        self._last_action = self._action_queue.popleft()
        return self._last_action

    def _find_last_action(self, batch: dict[str, Any], left_over_PA: Tensor | None) -> Tensor | None:
        """(B, A) or (1, A), normalised; None where it is not known, or not wanted."""
        if not self.config.reads_last_action:
            return None
        if ACTION in batch:
            return batch[ACTION][:, 0]
        if left_over_PA is not None and len(left_over_PA):
            return left_over_PA[:1]
        return self._last_action

    def _get_default_peft_targets(self) -> dict[str, Any]:
        return {
            "target_modules": r"model\.trunk\.backbone\..*\."
            r"(query_key_value|output|gate_up|down|[qkvo]_proj|(gate|up|down)_proj)",
            "modules_to_save": ["action_head", *(["state_token"] if self.config.use_state else [])],
        }

    def _inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images (B, C, H, W) of the model's size, text ids (B, W), and states (B, P) where the policy reads them."""
        key = next(iter(self.config.image_features))
        if key not in batch:
            raise ValueError(f"the batch has no {key!r}, only {sorted(batch)}: map the camera with rename_map")
        images_BCHW = batch[key]
        if images_BCHW.ndim != 4:
            raise ValueError(f"{key} is {tuple(images_BCHW.shape)}, expected (B, C, H, W): use the preprocessor")
        tasks = batch.get("task")
        if tasks is None:
            raise ValueError("the batch has no `task`: this policy needs the instruction, one string a sample")
        if isinstance(tasks, str):
            tasks = [tasks] * len(images_BCHW)
        size = (self.config.image_size, self.config.image_size)
        if images_BCHW.shape[-2:] != size:
            images_BCHW = F.interpolate(images_BCHW, size, mode="bilinear", antialias=True)
        state_BP = None
        if self.config.use_state:
            if OBS_STATE not in batch:
                raise ValueError(
                    f"the batch has no {OBS_STATE!r}, only {sorted(batch)}: this policy has use_state=true and "
                    "needs the robot's state"
                )
            state_BP = batch[OBS_STATE]
        return images_BCHW, self.model.trunk.encode_text(tasks).to(images_BCHW.device), state_BP
