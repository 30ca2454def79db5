"""UniPi's planner (arXiv 2302.00111): the future frame by diffusion, from the present frame and the instruction.

    [ instruction | image | begin, patches of the future frame, end ]

It is the denoising half of lapa/latent_vla/transfusion.py, without latent actions. Unlike the paper's, which plans a
whole video, one frame a gap ahead is planned: the policy plans anew before it would use a later one.

Shapes: B batch, C channels, H W pixels, P patches, D width, W text ids.
"""

import torch
from torch import Tensor, nn

from lapa import schema
from lapa.backbones.base import Cache, Layout
from lapa.latent_vla.model import DENOISED_BLOCK, VisionLanguageTrunk, with_auxiliary
from lapa.latent_vla.transfusion import FrameDenoiser
from lapa.text import PADDING_ID


class FramePlanner(nn.Module):
    """Trunk and denoiser: what `lapa pretrain predict=frame` trains."""

    def __init__(self, trunk: VisionLanguageTrunk, config: schema.FutureFrame):
        super().__init__()
        self.trunk, self.future_frame = trunk, config
        self.frame = FrameDenoiser(trunk.width, config, condition_channels=3)

    def loss(
        self,
        images_BCHW: Tensor,
        ids_BW: Tensor,
        future_BCHW: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and numbers to log, for future frames (B, 3, H, W) in [0, 1].

        Args:
            generator: on the CPU, of times and noise; None: torch's own, which `lapa.trainer.fit` seeds.
        """
        device, batch = images_BCHW.device, len(images_BCHW)
        clean_BCHW = self.frame.shrink(future_BCHW)
        is_dropped_B = torch.rand(batch, generator=generator) < self.future_frame.condition_dropout
        time_B = self.frame.process.draw_times(batch, generator).to(device)
        noise_BCHW = torch.randn(clean_BCHW.shape, generator=generator).to(device)
        ids_BW = ids_BW.masked_fill(is_dropped_B.to(device)[:, None], PADDING_ID)
        prefix_BSD, prefix = self.trunk.prefix(images_BCHW, ids_BW)
        noised_BCHW = self.frame.process.corrupt(clean_BCHW, noise_BCHW, time_B)
        patches_BPD, read = self.frame.embed(noised_BCHW, time_B, self.frame.shrink(images_BCHW))
        frame_BPD, modality_ids_BP, block_ids_BP = self.frame.enclose(patches_BPD, DENOISED_BLOCK)
        tail = Layout.of(modality_ids_BP, block_ids_BP, first_position=prefix.position_ids_BS[:, -1] + 1)
        tokens_BSD = torch.cat([prefix_BSD, frame_BPD.to(prefix_BSD.dtype)], dim=1)
        hidden_BSD = self.trunk.backbone(tokens_BSD, prefix.then(tail))
        prediction_BCHW = read(hidden_BSD[:, prefix_BSD.shape[1] + 1 : -1])
        loss = self.frame.loss(prediction_BCHW, clean_BCHW, noise_BCHW).mean()
        return with_auxiliary(loss, {"future_frame_loss": loss.detach()}, self.trunk)

    @torch.no_grad()
    def imagine(self, images_BCHW: Tensor, ids_BW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A sample of the future frame (B, 3, H, W) in [0, 1].

        Args:
            generator: of the noise, on the CPU. None: every row starts from the same fixed noise, so that the plan
                depends on image and instruction alone.
        """
        config, batch = self.future_frame, len(images_BCHW)
        shape = self.frame.frame_shape
        if generator is None:
            fixed = torch.Generator().manual_seed(0)
            start_BCHW = torch.randn(1, *shape, generator=fixed).repeat(batch, 1, 1, 1)
        else:
            start_BCHW = torch.randn(batch, *shape, generator=generator)
        caches = []
        for ids in [ids_BW] if config.guidance == 1.0 else [ids_BW, torch.full_like(ids_BW, PADDING_ID)]:
            caches.append(Cache())
            self.trunk.backbone(*self.trunk.prefix(images_BCHW, ids), caches[-1])
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
