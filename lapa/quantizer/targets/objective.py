"""Everything that is trained with a quantizer: the target, conditioning and heads around it, as one module.

Shapes: B batch, C = 3 colours, H = W = image_size, L code_length, D latent_dim, N num_codes.

The pixel forward model always trains, so that decoding, galleries and delta-PSNR compare across targets; what of its
gradient reaches the latent action is up to the target.
"""

from torch import Tensor, nn

from lapa.quantizer.base import LatentActionQuantizer
from lapa.quantizer.targets.base import PairBatch, Target
from lapa.quantizer.targets.batches import PairSampler
from lapa.quantizer.targets.features import Features
from lapa.quantizer.targets.heads import Grounding, Proprioception
from lapa.quantizer.targets.language import TaskIrrelevant, build_language
from lapa.quantizer.targets.latent_consistency import LatentConsistency
from lapa.quantizer.targets.pixels import Perceptual, Pixels, motion_pixels
from lapa.schema import (
    FeatureTarget,
    LatentConsistencyTarget,
    MotionPixelTarget,
    PerceptualTarget,
    TrainQuantizerConfig,
)
from lapa.schema import Target as TargetConfig


class TrainingObjective(nn.Module):
    """A quantizer and what it is trained with; called with a batch, it gives the loss and numbers to log."""

    def __init__(
        self,
        quantizer: LatentActionQuantizer,
        target: Target,
        language: TaskIrrelevant | None = None,
        proprioception: Proprioception | None = None,
        grounding: Grounding | None = None,
        proprioception_weight: float = 0.0,
        grounding_weight: float = 0.0,
    ):
        super().__init__()
        self.quantizer, self.target, self.language = quantizer, target, language
        self.proprioception, self.proprioception_weight = proprioception, proprioception_weight
        self.grounding, self.grounding_weight = grounding, grounding_weight

    def forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        frames_B2CHW = self.target.inverse_frames(batch)
        if self.language is not None:
            assert batch.words_BW is not None
            context = self.language(frames_B2CHW, batch.words_BW)
            if context.is_first_part:
                loss, numbers = self.explain(batch, context.latents_BLD)
                return loss + context.codebook_loss, numbers
        quantised = self.quantizer.quantise(frames_B2CHW)
        latents_BLD = quantised.latents_BLD
        seen_BLD = latents_BLD if self.language is None else latents_BLD + context.latents_BLD
        loss, numbers = self.explain(batch, seen_BLD)
        loss = loss + quantised.loss
        if self.proprioception is not None:
            assert batch.states_B2S is not None
            error = self.proprioception(latents_BLD, batch.states_B2S)
            loss, numbers["proprioception_error"] = loss + self.proprioception_weight * error, error.detach()
        if self.grounding is not None:
            assert batch.actions_BA is not None and batch.has_action_B is not None
            error = self.grounding(latents_BLD, batch.actions_BA, batch.has_action_B)
            loss, numbers["grounding_error"] = loss + self.grounding_weight * error, error.detach()
        return loss, numbers | self.quantizer.codes_used(quantised.codes_BN)

    def explain(self, batch: PairBatch, latents_BLD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The target's loss on latents (B, L, D), with the pixel forward model's prediction from them."""
        kept_BLD = latents_BLD.detach()
        if self.target.pixel_gradient == 1:
            kept_BLD = latents_BLD
        elif self.target.pixel_gradient > 0:
            kept_BLD = kept_BLD + self.target.pixel_gradient * (latents_BLD - kept_BLD)
        predicted_BCHW = self.quantizer.predict(batch.frames_B2CHW[:, 0], kept_BLD)
        return self.target(batch, latents_BLD, predicted_BCHW)

    def finish(self) -> None:
        """Leave in the quantizer what it needs once the rest is gone: the mean of the language's codes."""
        if self.language is not None:
            self.quantizer.keep_context(self.language.mean_LD)


def build_target(config: TargetConfig, code_length: int, latent_dim: int, image_size: int) -> Target:
    """The target that `config` describes; ValueError for a name we do not know."""
    if config.name == "pixels":
        return Pixels()
    if isinstance(config, MotionPixelTarget):
        return motion_pixels(config)
    if isinstance(config, PerceptualTarget):
        return Perceptual(config, image_size)
    if isinstance(config, FeatureTarget):
        return Features(config, code_length, latent_dim, image_size)
    if isinstance(config, LatentConsistencyTarget):
        return LatentConsistency(config, code_length, latent_dim)
    raise ValueError(
        f"unknown target {config.name!r}: expected pixels, motion_pixels, perceptual, features or latent_consistency"
    )


def build_objective(
    config: TrainQuantizerConfig, quantizer: LatentActionQuantizer, sampler: PairSampler
) -> TrainingObjective:
    """The objective of a configuration around `quantizer`, which is not changed: its weights are drawn before."""
    length, dim = quantizer.latent_shape
    proprioception, grounding = None, None
    if config.proprioception.weight > 0:
        proprioception = Proprioception(length * dim, config.proprioception.hidden_width, *sampler.state_statistics())
    if config.grounding.share_of_episodes > 0:
        grounding = Grounding(length * dim, config.grounding.hidden_width, *sampler.action_statistics())
    return TrainingObjective(
        quantizer,
        build_target(config.target, length, dim, config.model.image_size),
        build_language(config.language, config.model, config.codebook, config.training.num_steps),
        proprioception,
        grounding,
        config.proprioception.weight,
        config.grounding.weight,
    )
