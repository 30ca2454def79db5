"""The LAPA policy's configuration, in LeRobot's terms."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

from lapa.schema import DenseBackbone, FinetuneConfig, WordText

DEFAULTS = FinetuneConfig()


@PreTrainedConfig.register_subclass("lapa")
@dataclass
class LapaConfig(PreTrainedConfig):
    """Image and instruction, and the robot's state if wanted, to a chunk of actions (arXiv 2410.11758).

    backbone, text: the fields of one of `lapa.schema`'s backbones and text encoders, `name` among them.
    action_head: chunk (continuous), bins (quantile bins), diffusion or flow (sampled chunks).
    num_sampling_steps: from noise to a chunk, where action_head is diffusion or flow.
    n_action_steps: actions of a chunk that are executed before the policy looks again.
    use_state: also read observation.state, normalised by mean and standard deviation unless normalization_mapping
        names another way.
    state_dropout: share of the samples in training whose state is hidden.
    relative_actions: the model predicts how far the robot shall go; outside, actions stay positions.
    relative_to: from where: state, or last_action. `select_action` remembers it; `predict_action_chunk` finds it in the
        batch as `action` (B, 1, A). Where there is none, as when an episode begins, distances are from the state.
    """

    n_obs_steps: int = 1
    chunk_size: int = DEFAULTS.chunk_size
    n_action_steps: int = DEFAULTS.num_action_steps

    image_size: int = DEFAULTS.image_size
    image_tokenizer: str = DEFAULTS.image_tokenizer
    text: dict[str, Any] = field(default_factory=lambda: asdict(WordText()))
    backbone: dict[str, Any] = field(default_factory=lambda: asdict(DenseBackbone()))
    action_head: str = DEFAULTS.action_head
    num_bins: int = DEFAULTS.num_bins
    num_sampling_steps: int = DEFAULTS.num_sampling_steps
    use_state: bool = DEFAULTS.use_state
    state_dropout: float = DEFAULTS.state_dropout
    relative_actions: bool = DEFAULTS.relative_actions
    relative_to: str = DEFAULTS.relative_to

    # Images reach the model in [0, 1]; its own first layer centres them.
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
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, expected 1 to chunk_size, which is {self.chunk_size}"
            )
        if self.relative_to not in ("state", "last_action"):
            raise ValueError(f"relative_to is {self.relative_to!r}, expected state or last_action")
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps is {self.n_obs_steps}: this policy sees one frame, set it to 1")
        if self.use_state and self.normalization_mapping.get("STATE") in (None, NormalizationMode.IDENTITY):
            # A state that is not read may come as it is, and the data set need not know its statistics.
            self.normalization_mapping = self.normalization_mapping | {"STATE": NormalizationMode.MEAN_STD}

    def validate_features(self) -> None:
        if not self.image_features:
            raise ValueError(
                f"this policy needs an image among its inputs, got {sorted(self.input_features or {})}: "
                "record observation.images.* or map a camera with rename_map"
            )
        if self.action_feature is None:
            raise ValueError(f"this policy needs the output `action`, got {sorted(self.output_features or {})}")
        if self.relative_actions and not self.use_state:
            raise ValueError("relative_actions needs the state that they are relative to: set use_state=true")
        if self.use_state and self.robot_state_feature is None:
            raise ValueError(
                f"use_state needs observation.state among the inputs, got {sorted(self.input_features or {})}: "
                "record the robot's state, or set use_state=false"
            )

    def get_optimizer_preset(self) -> AdamWConfig:
        training = DEFAULTS.training
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=(training.beta1, training.beta2),
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=training.grad_clip,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=DEFAULTS.training.num_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=self.optimizer_lr * DEFAULTS.training.final_learning_rate_ratio,
        )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(-1 if self.reads_last_action else 0, self.chunk_size))

    @property
    def reads_last_action(self) -> bool:
        return self.relative_actions and self.relative_to == "last_action"

    @property
    def reward_delta_indices(self) -> None:
        return None
