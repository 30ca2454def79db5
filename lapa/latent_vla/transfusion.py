"""Transfusion: next-token prediction and diffusion in one transformer (arXiv 2408.11039).

    [ instruction | image | readout, latent action tokens | begin, patches of the future frame, end ]
      see each other        each sees what came before             patches see each other too

The loss is that of the latent action tokens plus `weight` times that of the denoised frame, one number an image. In
some samples the frame comes before the latent action, which then says what happened; there the frame is never so
noisy that nothing can be read from it (the noise cap).

Unlike the paper's, the patches of the present frame are joined to the noised ones at the same places: image tokens
that say where things are, such as keypoints, do not say what they look like. Unlike the paper's, the frame itself is
predicted, not the noise, unless `predicts` says otherwise (lapa/latent_vla/diffusion.py).

Shapes: B batch, C channels, H W pixels, S sequence, L codes of a latent action, P patches, D width, W text ids.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa import schema
from lapa.backbones.base import IMAGE, LATENT_ACTION, NO_BLOCK, TEXT, Backbone, Cache, Layout
from lapa.latent_vla.diffusion import TimeEmbedding, build_noise_process, guided
from lapa.latent_vla.model import DENOISED_BLOCK, LatentActionModel, VisionLanguageTrunk, with_auxiliary
from lapa.latent_vla.patches import build_patches
from lapa.text import PADDING_ID

Read = Callable[[Tensor], Tensor]  # hidden states of patches (B, P, D) to the prediction (B, C, H, W)


class FrameDenoiser(nn.Module):
    """A frame (B, 3, H, W) in [-1, 1] as tokens [begin, patches, end] of a backbone.

    Args:
        condition_channels: of images that are given to `embed` beside the noised frame.
    """

    def __init__(self, width: int, config: schema.FutureFrame, condition_channels: int = 0):
        super().__init__()
        if config.predicts not in ("data", "papers", "change"):
            raise ValueError(f"future_frame.predicts is {config.predicts!r}, expected data, papers or change")
        noise_numbers = 3 * config.patch_size**2
        if config.predicts == "papers" and config.patches == "linear" and noise_numbers > width:
            raise ValueError(
                f"the noise of a patch is {noise_numbers} numbers, which do not pass through tokens of width {width}: "
                "choose a smaller future_frame.patch_size, patches=unet, or predicts=data"
            )
        self.adds_condition = config.predicts == "change"
        if self.adds_condition and condition_channels != 3:
            raise ValueError(
                "future_frame.predicts=change needs the present frame beside the noised one; predicts=data does not"
            )
        self.process = build_noise_process(config.process, "data" if self.adds_condition else config.predicts)
        self.time = TimeEmbedding(width)
        self.patches = build_patches(config, width, in_channels=3 + condition_channels)
        if self.adds_condition:  # at first nothing changes
            self.patches.start_at_zero()
        self.begin = nn.Parameter(torch.randn(width))
        self.end = nn.Parameter(torch.randn(width))

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        return 3, self.patches.image_size, self.patches.image_size

    def shrink(self, images_BCHW: Tensor) -> Tensor:
        """Images in [0, 1] to the size that is denoised, in [-1, 1]."""
        size = self.frame_shape[1:]
        if images_BCHW.shape[-2:] != size:
            images_BCHW = F.interpolate(images_BCHW, size, mode="bilinear", antialias=True)
        return images_BCHW * 2 - 1

    def embed(self, noised_BCHW: Tensor, time_B: Tensor, condition_BCHW: Tensor | None = None) -> tuple[Tensor, Read]:
        """Patch tokens (B, P, D), and how to read the prediction from their hidden states."""
        given_BCHW = noised_BCHW if condition_BCHW is None else torch.cat([noised_BCHW, condition_BCHW], dim=1)
        time_BD = self.time(time_B)
        tokens_BPD, skips = self.patches.embed(given_BCHW, time_BD)
        present_BCHW = condition_BCHW if self.adds_condition else None

        def read(hidden_BPD: Tensor) -> Tensor:
            out_BCHW = self.patches.read(hidden_BPD, time_BD, skips).float()
            return out_BCHW if present_BCHW is None else present_BCHW + out_BCHW

        return tokens_BPD, read

    def enclose(self, patches_BPD: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, P + 2, D) with begin and end, their modality ids and their block ids, both (B, P + 2) int64."""
        batch, num_patches, _ = patches_BPD.shape
        begin_B1D, end_B1D = (token.expand(batch, 1, -1) for token in (self.begin, self.end))
        modality_ids_S = torch.tensor([TEXT, *[IMAGE] * num_patches, TEXT], device=patches_BPD.device)
        block_ids_S = torch.tensor([NO_BLOCK, *[block] * num_patches, NO_BLOCK], device=patches_BPD.device)
        tokens_BSD = torch.cat([begin_B1D, patches_BPD, end_B1D], dim=1)
        return tokens_BSD, modality_ids_S.expand(batch, -1), block_ids_S.expand(batch, -1)

    def loss(self, prediction_BCHW: Tensor, clean_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Squared error an image (B,)."""
        return (prediction_BCHW - self.process.target(clean_BCHW, noise_BCHW)).square().mean((1, 2, 3))

    @torch.no_grad()
    def append(
        self,
        backbone: Backbone,
        cache: Cache,
        start_BCHW: Tensor,
        num_steps: int,
        block: int,
        condition_BCHW: Tensor | None = None,
        guidance: float = 1.0,
        unconditional: Cache | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Denoise a frame (B, 3, H, W) after the tokens of `cache`.

        The keys and values of all before it are computed once. The cache then holds begin, the clean frame at time 0,
        and end, so that tokens can follow.

        Args:
            start_BCHW: noise.
            block: an id that no other block of the sequence has.
            guidance: 1: none; else with `unconditional`, a cache of the same tokens without the condition, which
                is used up.
        """
        contexts = [cache]
        if guidance != 1.0:
            if unconditional is None:
                raise ValueError(f"guidance is {guidance}, which needs a cache without the condition")
            contexts.append(unconditional)
        batch = len(start_BCHW)
        for context in contexts:
            extend(backbone, self.begin.expand(batch, 1, -1), TEXT, context)

        def predict(noised_BCHW: Tensor, time_B: Tensor) -> Tensor:
            tokens_BPD, read = self.embed(noised_BCHW, time_B, condition_BCHW)
            predictions = []
            for context in contexts:
                length = context.length
                predictions.append(read(extend(backbone, tokens_BPD, IMAGE, context, block)))
                context.truncate(length)
            return guided(predictions[0], predictions[1], guidance) if len(predictions) == 2 else predictions[0]

        clean_BCHW = self.process.sample(predict, start_BCHW, num_steps, 1.0, generator)
        tokens_BPD, _ = self.embed(clean_BCHW, torch.zeros(batch, device=clean_BCHW.device), condition_BCHW)
        extend(backbone, tokens_BPD, IMAGE, cache, block)
        extend(backbone, self.end.expand(batch, 1, -1), TEXT, cache)
        return clean_BCHW


def extend(backbone: Backbone, tokens_BSD: Tensor, modality: int, cache: Cache, block: int = NO_BLOCK) -> Tensor:
    """Hidden states (B, S, D) of tokens of one kind that follow those of the cache."""
    modality_ids_BS = torch.full(tokens_BSD.shape[:2], modality, device=tokens_BSD.device)
    first_position = 0 if cache.layout is None else cache.layout.position_ids_BS[:, -1] + 1
    layout = Layout.of(modality_ids_BS, torch.full_like(modality_ids_BS, block), first_position=first_position)
    return backbone(tokens_BSD, layout, cache)


def run_in_order(backbone: Backbone, tokens_BSD: Tensor, layout: Layout, order_BS: Tensor) -> Tensor:
    """Hidden states (B, S, D) in the order of the arguments, computed in another order, of each row its own.

    Args:
        layout: without padding from the first token on that changes its place.
        order_BS: which token comes first, second, ...
    """
    index_BSD = order_BS[..., None].expand_as(tokens_BSD)
    ordered = replace(layout.select(order_BS), position_ids_BS=layout.position_ids_BS)
    hidden_BSD = backbone(tokens_BSD.gather(1, index_BSD), ordered)
    return hidden_BSD.gather(1, order_BS.argsort(1)[..., None].expand_as(hidden_BSD))


class TransfusionModel(LatentActionModel):
    """A latent action model that denoises the future frame too."""

    def __init__(
        self,
        trunk: VisionLanguageTrunk,
        num_codes: int,
        codebook_size: int,
        config: schema.FutureFrame,
        chunk_size: int = 1,
    ):
        super().__init__(trunk, num_codes, codebook_size, chunk_size)
        for name in ("frame_first_share", "condition_dropout"):
            if not 0 <= getattr(config, name) <= 1:
                raise ValueError(f"future_frame.{name} is {getattr(config, name)}, expected a share from 0 to 1")
        if not 0 < config.frame_first_max_noise <= 1:
            raise ValueError(
                f"future_frame.frame_first_max_noise is {config.frame_first_max_noise}, expected more than 0, at most 1"
            )
        self.future_frame = config
        self.frame = FrameDenoiser(trunk.width, config, condition_channels=3)
        # The chain of codes predicts from all but the last of them; the frame follows all of them.
        self.last_code = nn.Parameter(torch.randn(codebook_size, trunk.width) * trunk.width**-0.5)
        self.no_code = nn.Parameter(torch.randn(trunk.width) * trunk.width**-0.5)

    def whole_latent(self, latent_BL: Tensor, is_dropped_B: Tensor) -> Tensor:
        """The readout token and all L latent action tokens (B, L + 1, D); dropped rows tell no latent action."""
        codes_BLD = self.latent_head.tokens(self.trunk.readout, latent_BL[:, :-1])
        codes_BLD = torch.cat([codes_BLD, self.last_code[latent_BL[:, -1:]]], dim=1)
        readout_B1D, codes_BLD = codes_BLD[:, :1], codes_BLD[:, 1:]
        codes_BLD = torch.where(is_dropped_B[:, None, None], self.no_code.to(codes_BLD.dtype), codes_BLD)
        return torch.cat([readout_B1D, codes_BLD], dim=1)

    def joint_loss(
        self,
        images_BCHW: Tensor,
        ids_BW: Tensor,
        latent_BTL: Tensor,
        future_BCHW: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and numbers to log, for chunks of latent actions (B, T, L) int64 and future frames in [0, 1].

        Args:
            generator: on the CPU, of orders, times and noise; None: torch's own, which `lapa.trainer.fit` seeds.
        """
        config, device, latent_BL = self.future_frame, images_BCHW.device, latent_BTL[:, 0]
        batch, num_codes = latent_BL.shape
        clean_BCHW = self.frame.shrink(future_BCHW)
        frame_first_B = torch.rand(batch, generator=generator) < config.frame_first_share
        is_dropped_B = torch.rand(batch, generator=generator) < config.condition_dropout
        is_dropped_B[0] = False  # some row has to teach the latent action
        most_noise_B = torch.where(frame_first_B, config.frame_first_max_noise, 1.0)
        time_B = self.frame.process.draw_times(batch, generator, most_noise_B).to(device)
        noise_BCHW = torch.randn(clean_BCHW.shape, generator=generator).to(device)
        frame_first_B, is_dropped_B = frame_first_B.to(device), is_dropped_B.to(device)

        prefix_BSD, prefix = self.trunk.prefix(images_BCHW, ids_BW.masked_fill(is_dropped_B[:, None], PADDING_ID))
        latent_BLD = self.whole_latent(latent_BL, is_dropped_B)
        noised_BCHW = self.frame.process.corrupt(clean_BCHW, noise_BCHW, time_B)
        patches_BPD, read = self.frame.embed(noised_BCHW, time_B, self.frame.shrink(images_BCHW))
        frame_BPD, frame_modality_ids_BP, frame_block_ids_BP = self.frame.enclose(patches_BPD, DENOISED_BLOCK)
        latent_modality_ids_BL = torch.full(latent_BLD.shape[:2], LATENT_ACTION, device=device)
        tail = Layout.of(
            torch.cat([latent_modality_ids_BL, frame_modality_ids_BP], dim=1),
            torch.cat([torch.full_like(latent_modality_ids_BL, NO_BLOCK), frame_block_ids_BP], dim=1),
            first_position=prefix.position_ids_BS[:, -1] + 1,
        )
        start, end = prefix_BSD.shape[1], prefix_BSD.shape[1] + num_codes + 1
        places_S = torch.arange(end + frame_BPD.shape[1], device=device)
        frame_first_S = torch.cat([places_S[:start], places_S[end:], places_S[start:end]])
        order_BS = torch.where(frame_first_B[:, None], frame_first_S, places_S)
        tokens = [prefix_BSD, latent_BLD.to(prefix_BSD.dtype), frame_BPD.to(prefix_BSD.dtype)]
        hidden_BSD = run_in_order(self.trunk.backbone, torch.cat(tokens, dim=1), prefix.then(tail), order_BS)

        is_told_B = ~is_dropped_B
        hidden_BLD = hidden_BSD[:, start : end - 1]
        loss, numbers = self.latent_head.loss(hidden_BLD[is_told_B], latent_BTL[is_told_B])
        prediction_BCHW = read(hidden_BSD[:, end + 1 : -1])
        frame_loss = self.frame.loss(prediction_BCHW, clean_BCHW, noise_BCHW).mean()
        numbers = numbers | {"future_frame_loss": frame_loss.detach()}
        return with_auxiliary(loss + config.weight * frame_loss, numbers, self.trunk)

    @torch.no_grad()
    def imagine(
        self, images_BCHW: Tensor, ids_BW: Tensor, latent_BL: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """A sample of the future frame (B, 3, H, W) in [0, 1], after latent actions (B, L) int64.

        Args:
            generator: of the noise, on the CPU; None: seed 0.
        """
        config = self.future_frame
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        start_BCHW = torch.randn(len(images_BCHW), *self.frame.frame_shape, generator=generator)
        caches = []
        for drops in (False, True):
            cache = Cache()
            is_dropped_B = torch.full((len(ids_BW),), drops, device=ids_BW.device)
            ids = ids_BW.masked_fill(is_dropped_B[:, None], PADDING_ID)
            self.trunk(images_BCHW, ids, self.whole_latent(latent_BL, is_dropped_B), LATENT_ACTION, cache)
            caches.append(cache)
            if config.guidance == 1.0:
                break
        frame_BCHW = self.frame.append(
            self.trunk.backbone,
            caches[0],
            start_BCHW.to(images_BCHW.device),
            config.num_sampling_steps,
            DENOISED_BLOCK,
            condition_BCHW=self.frame.shrink(images_BCHW),
            guidance=config.guidance,
            unconditional=caches[-1],
            generator=generator,
        )
        return (frame_BCHW + 1) / 2
