"""What every quantizer is: frame pair to latent action, first frame and latent action to the next frame.

Shapes: B batch, C = 3 colours, H = W = image_size, L code_length, D latent_dim; frames are in [0, 1].
Follows the latent action quantisation of LAPA (arXiv 2410.11758), stage 1.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from lapa.checkpoint import load_config, load_weights
from lapa.quantizer.codebooks import build_codebook
from lapa.schema import Codebook, QuantizerModel, from_dict


class LatentActionQuantizer(nn.Module, ABC):
    """An inverse model, a codebook and a forward model; subclasses bring the first and the last."""

    def __init__(self, config: QuantizerModel, codebook: Codebook):
        super().__init__()
        self.config, self.codebook_config = config, codebook
        self.codebook = build_codebook(codebook, config.latent_dim)

    @abstractmethod
    def infer(self, frames_B2CHW: Tensor) -> Tensor:
        """Latents (B, L, D) before quantisation, from frame pairs."""

    @abstractmethod
    def predict(self, first_BCHW: Tensor, quantised_BLD: Tensor) -> Tensor:
        """The second frame (B, C, H, W), from the first and the quantised latents."""

    def encode(self, frames_B2CHW: Tensor) -> tuple[Tensor, Tensor]:
        """Latent action codes (B, L) int64 and their quantised latents (B, L, D), from frame pairs in [0, 1]."""
        size = self.config.image_size
        if frames_B2CHW.shape[1:] != (2, 3, size, size):
            raise ValueError(
                f"frames have shape {tuple(frames_B2CHW.shape)}, this quantizer takes (B, 2, 3, {size}, {size})"
            )
        quantised_BLD, codes_BL = self.codebook(self.infer(frames_B2CHW))
        return codes_BL, quantised_BLD

    def decode(self, first_BCHW: Tensor, latent_action: Tensor) -> Tensor:
        """The predicted second frame (B, C, H, W), from codes (B, L) or quantised latents (B, L, D)."""
        if not latent_action.is_floating_point():
            latent_action = self.codebook.lookup(latent_action)
        return self.predict(first_BCHW, latent_action)

    def loss(self, frames_B2CHW: Tensor, motion_weight: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Error of the predicted second frame as a share of the error of repeating the first, and what to log.

        With `motion_weight` w, a pixel counts 1 + w * change times, where its change between the frames goes
        from 0 to 1 at a tenth of the full range.
        """
        first_BCHW, second_BCHW = frames_B2CHW[:, 0], frames_B2CHW[:, 1]
        codes_BL, quantised_BLD = self.encode(frames_B2CHW)
        predicted_BCHW = self.predict(first_BCHW, quantised_BLD).float()
        change_BCHW = (second_BCHW - first_BCHW).square()
        error_BCHW = (predicted_BCHW - second_BCHW).square()
        if motion_weight:
            largest_B1HW = change_BCHW.amax(1, keepdim=True).sqrt()
            weight_B1HW = 1 + motion_weight * (largest_B1HW * 10).clamp(max=1)
            error_BCHW, change_BCHW = error_BCHW * weight_B1HW, change_BCHW * weight_B1HW
        loss = error_BCHW.mean() / change_BCHW.mean().clamp(min=1e-6)
        used = torch.stack([codes.unique().numel() * loss.new_ones(()) for codes in codes_BL.unbind(1)])
        return loss, {"codes_used_in_batch": used.mean() / self.codebook_config.codebook_size}

    def description(self) -> dict:
        """What `build_quantizer` needs to build this model again, for config.json."""
        return {"model": asdict(self.config), "codebook": asdict(self.codebook_config)}


def build_quantizer(config: QuantizerModel, codebook: Codebook) -> LatentActionQuantizer:
    """A quantizer with random weights."""
    from lapa.quantizer.convolutional import ConvolutionalLAQ
    from lapa.quantizer.transformer import TransformerLAQ
    from lapa.schema import ConvolutionalQuantizer, TransformerQuantizer

    if isinstance(config, ConvolutionalQuantizer):
        return ConvolutionalLAQ(config, codebook)
    if isinstance(config, TransformerQuantizer):
        return TransformerLAQ(config, codebook)
    raise ValueError(f"unknown model {config.name!r}: expected convolutional or transformer")


def load_quantizer(folder: str | Path) -> LatentActionQuantizer:
    """The trained quantizer in a folder of `lapa train_quantizer`, on CPU and in inference mode."""
    config = load_config(folder, "train_quantizer")
    model = build_quantizer(from_dict("model", config["model"]), from_dict("codebook", config["codebook"]))
    load_weights(folder, model)
    return model.eval()
