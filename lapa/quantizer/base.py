"""What every quantizer is: frame pair to latent action, first frame and latent action to the next frame.

Shapes: B batch, C = 3 colours, H = W = image_size, L code_length, D latent_dim; frames are in [0, 1].
Follows the latent action quantisation of LAPA (arXiv 2410.11758), stage 1.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lapa.checkpoint import load_config, load_weights
from lapa.data import FramePairs, FrameStore, frame_gap
from lapa.quantizer.codebooks.base import Quantised, build_codebook
from lapa.quantizer.targets.base import pixel_error
from lapa.schema import Codebook, QuantizerModel, from_dict


class LatentActionQuantizer(nn.Module, ABC):
    """An inverse model, a codebook and a forward model; subclasses bring the first and the last."""

    def __init__(self, config: QuantizerModel, codebook: Codebook):
        super().__init__()
        self.config, self.codebook_config = config, codebook
        self.codebook = build_codebook(codebook, config.latent_dim)
        self.context_LD: Tensor | None
        self.register_buffer("context_LD", None)

    @abstractmethod
    def infer(self, frames_B2CHW: Tensor) -> Tensor:
        """Latents (B, L, D) before quantisation, from frame pairs."""

    @abstractmethod
    def predict(self, first_BCHW: Tensor, quantised_BLD: Tensor) -> Tensor:
        """The second frame (B, C, H, W), from the first and the quantised latents."""

    def quantise(self, frames_B2CHW: Tensor) -> Quantised:
        """Latents (B, L, D), codes (B, N) and the codebook's own loss, from frame pairs in [0, 1]."""
        size = self.config.image_size
        if frames_B2CHW.shape[1:] != (2, 3, size, size):
            raise ValueError(
                f"frames have shape {tuple(frames_B2CHW.shape)}, this quantizer takes (B, 2, 3, {size}, {size})"
            )
        return self.codebook(self.infer(frames_B2CHW))

    def encode(self, frames_B2CHW: Tensor) -> tuple[Tensor, Tensor]:
        """Latent action codes (B, N) and their quantised latents (B, L, D), from frame pairs in [0, 1].

        Codes are int64, one a token; several a token for residual quantisation, float32 for a continuous codebook.
        """
        quantised = self.quantise(frames_B2CHW)
        return quantised.codes_BN, quantised.latents_BLD

    def encode_clip(self, frames_FCHW: Tensor, pairs_B2: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` for pairs of these frames, named by index; models that look at a frame by itself do so once."""
        return self.encode(frames_FCHW[pairs_B2])

    def decode(self, first_BCHW: Tensor, latent_action: Tensor) -> Tensor:
        """The predicted second frame (B, C, H, W), from codes (B, N) or quantised latents (B, L, D).

        After training with an instruction (`language`), the forward model also reads codes of task-irrelevant
        change; here they are at their mean.
        """
        if latent_action.ndim == 2:
            latent_action = self.codebook.lookup(latent_action)
        if self.context_LD is not None:
            latent_action = latent_action + self.context_LD
        return self.predict(first_BCHW, latent_action)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(L, D) of the latents that the forward model reads."""
        dtype = torch.int64 if self.codebook.is_discrete else torch.float32
        device = next(self.parameters()).device
        with torch.no_grad():
            latents_BLD = self.codebook.lookup(torch.zeros(1, self.codebook.num_codes, dtype=dtype, device=device))
        return latents_BLD.shape[1], latents_BLD.shape[2]

    def keep_context(self, mean_LD: Tensor) -> None:
        """Let `decode` add `mean_LD` to the latents; it is saved with the weights."""
        self.context_LD = mean_LD.detach().clone()

    def loss(self, frames_B2CHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixel error as a share of that of repeating the first frame, without any other target, and what to log."""
        quantised = self.quantise(frames_B2CHW)
        predicted_BCHW = self.predict(frames_B2CHW[:, 0], quantised.latents_BLD)
        loss = pixel_error(predicted_BCHW, frames_B2CHW) + quantised.loss
        return loss, self.codes_used(quantised.codes_BN)

    def codes_used(self, codes_BN: Tensor) -> dict[str, Tensor]:
        """The share of its codes that a token uses in this batch, mean over tokens; nothing if continuous."""
        if not self.codebook.is_discrete:
            return {}
        used = [codes.unique().numel() / self.codebook.codebook_size for codes in codes_BN.unbind(1)]
        return {"codes_used_in_batch": torch.tensor(used).mean()}

    def description(self) -> dict:
        """What `build_quantizer` needs to build this model again, for config.json."""
        return {
            "model": asdict(self.config),
            "codebook": asdict(self.codebook_config),
            "has_context": self.context_LD is not None,
        }


def build_quantizer(config: QuantizerModel, codebook: Codebook) -> LatentActionQuantizer:
    """A quantizer with random weights."""
    from lapa.quantizer.convolutional import ConvolutionalLAQ
    from lapa.quantizer.laq import LAQ
    from lapa.quantizer.transformer import TransformerLAQ
    from lapa.schema import ConvolutionalQuantizer, LAQQuantizer, TransformerQuantizer

    if isinstance(config, ConvolutionalQuantizer):
        return ConvolutionalLAQ(config, codebook)
    if isinstance(config, TransformerQuantizer):
        return TransformerLAQ(config, codebook)
    if isinstance(config, LAQQuantizer):
        return LAQ(config, codebook)
    raise ValueError(f"unknown model {config.name!r}: expected convolutional, transformer or laq")


def load_quantizer(folder: str | Path) -> LatentActionQuantizer:
    """The trained quantizer in a folder of `lapa train_quantizer`, on CPU and in inference mode."""
    config = load_config(folder, "train_quantizer")
    model = build_quantizer(from_dict("model", config["model"]), from_dict("codebook", config["codebook"]))
    if config.get("has_context"):
        model.keep_context(torch.zeros(model.latent_shape))
    load_weights(folder, model)
    return model.eval()


def quantizer_pairs(store: FrameStore, config: dict, episodes: np.ndarray) -> FramePairs:
    """Pairs at the gap of the quantizer with this config.json: a time, so another rate has another gap in frames.

    A gap that was stated in frames stays one in data of the same rate.
    """
    stated = store.fps == config["fps"] and (store.episode_fps is None or config.get("is_gap_in_frames", False))
    return FramePairs(
        store, frame_gap(store, config["frame_gap_s"], config["frame_gap_frames"] if stated else None), episodes
    )
