"""The UniPi policy's configuration, in LeRobot's terms."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

from lapa.schema import DenseBackbone, FinetuneUnipiConfig, FutureFrame, TrainInverseConfig, WordText

DEFAULTS = FinetuneUnipiConfig()
INVERSE_DEFAULTS = TrainInverseConfig()


@PreTrainedConfig.register_subclass("unipi")
@dataclass
class UnipiConfig(PreTrainedConfig):
    """Image and instruction to a planned frame, and by an inverse model to the actions that lead there.

    backbone, text, future_frame: the fields of `lapa.schema`'s, `name` among the first two's.
    frame_gap_frames: control steps from the present frame to the planned one, and actions that the inverse model tells.
    n_action_steps: of these that are executed before the policy plans again.
    inverse_width, num_keypoints: of the inverse model.
    """

    n_obs_steps: int = 1
    frame_gap_frames: int = 3
    n_action_steps: int = DEFAULTS.num_action_steps

    image_size: int = 64
    image_tokenizer: str = "keypoints"
    text: dict[str, Any] = field(default_factory=lambda: asdict(WordText()))
    backbone: dict[str, Any] = field(default_factory=lambda: asdict(DenseBackbone()))
    future_frame: dict[str, Any] = field(default_factory=lambda: asdict(FutureFrame()))
    inverse_width: int = INVERSE_DEFAULTS.width
    num_keypoints: int = INVERSE_DEFAULTS.num_keypoints

    # Images reach the models in [0, 1]; their own first layers centre them.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.IDENTITY,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )

    optimizer_lr: float = DEFAULTS.training.learning_rate
    optimizer_weight_decay: float = DEFAULTS.training.weight_decay
    scheduler_warmup_steps: int = DEFAULTS.training.warmup_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.frame_gap_frames:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, expected 1 to frame_gap_frames, which is "
                f"{self.frame_gap_frames}: a plan leads no further"
            )

    def validate_features(self) -> None:
        if not self.image_features:
            raise ValueError(f"this policy needs an image among its inputs, got {sorted(self.input_features or {})}")
        if self.action_feature is None:
            raise ValueError(f"this policy needs the output `action`, got {sorted(self.output_features or {})}")

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(lr=self.optimizer_lr, weight_decay=self.optimizer_weight_decay, grad_clip_norm=1.0)

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=DEFAULTS.training.num_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=self.optimizer_lr * DEFAULTS.training.final_learning_rate_ratio,
        )

    @property
    def observation_delta_indices(self) -> list[int]:
        """Training reads the present frame and the one that is planned."""
        return [0, self.frame_gap_frames]

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None
