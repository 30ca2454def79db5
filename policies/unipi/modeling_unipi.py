"""The UniPi policy (arXiv 2302.00111): plan the next frame, then read from it what to do.

    image, instruction ─ diffusion ─▶ frame a gap ahead ─ inverse model ─▶ the actions in between

Shapes: B batch, C channels, H W pixels, G actions of a frame gap, A action dimensions.
"""

from collections import deque
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lapa import schema
from lapa.latent_vla.model import build_trunk
from lapa.latent_vla.planner import FramePlanner
from lapa.quantizer.inverse import InverseDynamicsModel
from lapa.trainer import parameter_groups
from policies.unipi.configuration_unipi import UnipiConfig


class UnipiPolicy(PreTrainedPolicy):
    """Planner and inverse model. Training moves the planner; the inverse model comes from `lapa train_inverse`.

    A batch holds images (B, C, H, W) in [0, 1] under the configured key, in training (B, 2, C, H, W) with the frame to
    plan, and `task`: B strings.
    """

    config_class = UnipiConfig
    name = "unipi"

    def __init__(self, config: UnipiConfig, dataset_stats: Any = None, dataset_meta: Any = None, **kwargs: Any):
        super().__init__(config)
        config.validate_features()
        assert config.action_feature is not None
        self.config: UnipiConfig = config
        trunk = build_trunk(
            schema.from_dict("backbone", config.backbone),
            schema.from_dict("text", config.text),
            config.image_tokenizer,
            config.image_size,
        )
        # As built: a model of transformers then needs its folder no more.
        config.backbone = asdict(trunk.backbone.config)
        self.planner = FramePlanner(trunk, schema.FutureFrame(**config.future_frame))
        self.inverse = InverseDynamicsModel(
            config.image_size,
            config.inverse_width,
            config.num_keypoints,
            config.frame_gap_frames,
            config.action_feature.shape[0],
        ).requires_grad_(False)
        self.reset()

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path, *, strict: bool = True, **kwargs: Any):
        """Load a policy folder; weights that do not fit are an error, as half-loaded ones act at random."""
        return super().from_pretrained(pretrained_name_or_path, strict=strict, **kwargs)

    def get_optim_params(self) -> list[dict]:
        return parameter_groups(self, self.config.optimizer_weight_decay)

    def reset(self) -> None:
        """Forget the rest of the plan: call it when an episode begins."""
        self._action_queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The planner's loss, and numbers to log."""
        key = next(iter(self.config.image_features))
        if batch[key].ndim != 5 or batch[key].shape[1] != 2:
            raise ValueError(f"{key} is {tuple(batch[key].shape)}, expected (B, 2, C, H, W): present and future frame")
        present_BCHW, future_BCHW = batch[key].unbind(1)
        loss, numbers = self.planner.loss(*self._inputs({**batch, key: present_BCHW}), self._resize(future_BCHW))
        return loss, {name: float(value) for name, value in numbers.items()}

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Any], generator: torch.Generator | None = None, **kwargs: Any
    ) -> Tensor:
        """Normalised actions (B, G, A) up to the planned frame.

        Args:
            generator: on the CPU, of the plan's noise; None: the same observation gives the same plan.
        """
        self.eval()
        images_BCHW, ids_BW = self._inputs(batch)
        planned_BCHW = self.planner.imagine(images_BCHW, ids_BW, generator)
        # The present frame as coarse as the plan, so that the model compares like with like.
        present_BCHW = (self.planner.frame.shrink(images_BCHW) + 1) / 2
        return self.inverse(torch.stack([self._resize(present_BCHW), self._resize(planned_BCHW)], dim=1))

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next normalised action (B, A), from a new plan whenever n_action_steps of the last are used up."""
        if not self._action_queue:
            chunk_BGA = self.predict_action_chunk(batch, **kwargs)
            self._action_queue.extend(chunk_BGA[:, : self.config.n_action_steps].transpose(0, 1))
        return self._action_queue.popleft()

    def _inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) of the model's size, and text ids (B, W)."""
        key = next(iter(self.config.image_features))
        if key not in batch:
            raise ValueError(f"the batch has no {key!r}, only {sorted(batch)}: map the camera with rename_map")
        tasks = batch.get("task")
        if tasks is None:
            raise ValueError("the batch has no `task`: this policy needs the instruction, one string a sample")
        images_BCHW = self._resize(batch[key])
        if isinstance(tasks, str):
            tasks = [tasks] * len(images_BCHW)
        return images_BCHW, self.planner.trunk.encode_text(tasks).to(images_BCHW.device)

    def _resize(self, images_BCHW: Tensor) -> Tensor:
        size = (self.config.image_size, self.config.image_size)
        if images_BCHW.shape[-2:] == size:
            return images_BCHW
        return F.interpolate(images_BCHW, size, mode="bilinear", antialias=True)
