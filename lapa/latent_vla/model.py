"""The latent vision-language-action model: a trunk over instruction, image and action tokens, and its heads.

    [ words | image tokens | readout, then latent action tokens ]
      see each other          see the prefix and what came before

After arXiv 2410.11758: pretrained to predict latent actions, then the latent head is dropped and an action
head reads the same readout token, or denoises a chunk of tokens that follow it.

Shapes: B batch, W text ids, T text tokens or chunk size, I image tokens, L action tokens, S = T + I + L, D width,
A action dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lapa import schema
from lapa.backbones.base import IMAGE, LATENT_ACTION, NO_BLOCK, ROBOT_ACTION, TEXT, Cache, Layout, build_backbone
from lapa.backbones.text import build_text_encoder
from lapa.latent_vla.heads import (
    ActionHead,
    ContinuousLatentHead,
    DenoisingActionHead,
    LatentHead,
    ReadoutActionHead,
    masked_mean,
)
from lapa.latent_vla.vision import build_image_tokenizer

PREFIX_BLOCK = 0
DENOISED_BLOCK = 1


class VisionLanguageTrunk(nn.Module):
    """Everything that pretraining passes on to finetuning."""

    def __init__(self, backbone: schema.Backbone, text: schema.TextEncoder, image_tokenizer: str, image_size: int):
        super().__init__()
        self.width = backbone.width
        self.text_encoder = build_text_encoder(text, self.width)
        self.image_tokenizer = build_image_tokenizer(image_tokenizer, image_size, self.width)
        self.readout = nn.Parameter(torch.randn(self.width))
        self.backbone = build_backbone(backbone)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, W) int64 on the CPU, as `forward` takes them."""
        return self.text_encoder.encode_text(texts)

    def prefix(self, images_BCHW: Tensor, ids_BW: Tensor) -> tuple[Tensor, Layout]:
        """Embeddings (B, T + I, D) of instruction and image, one block, and their layout."""
        size = self.image_tokenizer.image_size
        if images_BCHW.shape[-2:] != (size, size):
            raise ValueError(f"images are {tuple(images_BCHW.shape)}, expected (B, 3, {size}, {size}): resize them")
        text = self.text_encoder(ids_BW)
        image_BID = self.image_tokenizer(images_BCHW, text.summary_BD)
        tokens_BSD = torch.cat([text.tokens_BTD, image_BID.to(text.tokens_BTD.dtype)], dim=1)
        is_image_BI = text.is_token_BT.new_ones(image_BID.shape[:2])
        modality_ids_BS = torch.full(tokens_BSD.shape[:2], IMAGE, device=tokens_BSD.device)
        modality_ids_BS[:, : text.tokens_BTD.shape[1]] = TEXT
        layout = Layout.of(
            modality_ids_BS,
            block_ids_BS=torch.full_like(modality_ids_BS, PREFIX_BLOCK),
            is_token_BS=torch.cat([text.is_token_BT, is_image_BI], dim=1),
        )
        return tokens_BSD, layout

    def forward(
        self,
        images_BCHW: Tensor,
        ids_BW: Tensor,
        action_BLD: Tensor,
        modality: int,
        cache: Cache | None = None,
        block: int | Tensor = NO_BLOCK,
        is_token_BL: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) of the action tokens.

        Args:
            images_BCHW: RGB in [0, 1], of the size the model was built for.
            ids_BW: of `encode_text`.
            action_BLD: embedded action tokens, the readout first.
            modality: LATENT_ACTION or ROBOT_ACTION.
            cache: filled with all of these tokens, for `extend`.
            block: DENOISED_BLOCK: the action tokens see each other both ways; (L,) int64 says it of each token.
            is_token_BL: bool, False for padding, which no token sees.
        """
        prefix_BSD, layout = self.prefix(images_BCHW, ids_BW)
        layout = layout.then(self.action_layout(layout, action_BLD, modality, block, is_token_BL))
        hidden_BSD = self.backbone(torch.cat([prefix_BSD, action_BLD.to(prefix_BSD.dtype)], dim=1), layout, cache)
        return hidden_BSD[:, -action_BLD.shape[1] :]

    def extend(self, action_BLD: Tensor, modality: int, cache: Cache, block: int = NO_BLOCK) -> Tensor:
        """Hidden states (B, L, D) of further action tokens, after those in the cache."""
        assert cache.layout is not None
        return self.backbone(action_BLD, self.action_layout(cache.layout, action_BLD, modality, block), cache)

    def action_layout(
        self,
        before: Layout,
        action_BLD: Tensor,
        modality: int,
        block: int | Tensor = NO_BLOCK,
        is_token_BL: Tensor | None = None,
    ) -> Layout:
        """Action tokens that follow the tokens of `before`."""
        modality_ids_BL = torch.full(action_BLD.shape[:2], modality, device=action_BLD.device)
        return Layout.of(
            modality_ids_BL,
            block_ids_BS=torch.as_tensor(block, device=action_BLD.device).expand_as(modality_ids_BL),
            is_token_BS=is_token_BL,
            first_position=before.position_ids_BS[:, -1] + 1,
        )


def with_auxiliary(loss: Tensor, numbers: dict[str, Tensor], trunk: VisionLanguageTrunk) -> tuple[Tensor, dict]:
    """The loss, and what the backbone's routers add to it."""
    auxiliary = trunk.backbone.auxiliary_loss()
    if auxiliary is None:
        return loss, numbers
    return loss + auxiliary, numbers | {"auxiliary_loss": auxiliary.detach()}


class LatentActionModel(nn.Module):
    """Trunk and latent head: what `lapa pretrain` trains on labels that are codes."""

    def __init__(self, trunk: VisionLanguageTrunk, num_codes: int, codebook_size: int):
        super().__init__()
        self.trunk = trunk
        self.latent_head = LatentHead(trunk.width, num_codes, codebook_size)

    def hidden(self, images_BCHW: Tensor, ids_BW: Tensor, known_BL: Tensor) -> Tensor:
        """Hidden states (B, l + 1, D) after the l latent tokens known so far."""
        tokens_BLD = self.latent_head.tokens(self.trunk.readout, known_BL)
        return self.trunk(images_BCHW, ids_BW, tokens_BLD, LATENT_ACTION)

    def loss(self, images_BCHW: Tensor, ids_BW: Tensor, latent_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and numbers to log, for latent actions (B, L) int64."""
        loss, numbers = self.latent_head.loss(self.hidden(images_BCHW, ids_BW, latent_BL[:, :-1]), latent_BL)
        return with_auxiliary(loss, numbers, self.trunk)

    @torch.no_grad()
    def generate(self, images_BCHW: Tensor, ids_BW: Tensor) -> Tensor:
        """Greedy latent actions (B, L) int64."""
        cache = Cache()
        latent_BL = ids_BW.new_zeros(len(ids_BW), 0)
        tokens_BLD = self.latent_head.tokens(self.trunk.readout, latent_BL)
        hidden_BLD = self.trunk(images_BCHW, ids_BW, tokens_BLD, LATENT_ACTION, cache)
        for code in range(self.latent_head.num_codes):
            if code:
                tokens_BLD = self.latent_head.tokens(self.trunk.readout, latent_BL)[:, -1:]
                hidden_BLD = torch.cat([hidden_BLD, self.trunk.extend(tokens_BLD, LATENT_ACTION, cache)], dim=1)
            chosen_BL = self.latent_head.logits(hidden_BLD)[:, -1:].argmax(-1)
            latent_BL = torch.cat([latent_BL, chosen_BL], dim=1)
        return latent_BL


class ContinuousLatentModel(nn.Module):
    """Trunk and continuous latent head: what `lapa pretrain` trains on labels that are numbers."""

    def __init__(self, trunk: VisionLanguageTrunk, num_codes: int):
        super().__init__()
        self.trunk = trunk
        self.latent_head = ContinuousLatentHead(trunk.width, num_codes)

    def hidden(self, images_BCHW: Tensor, ids_BW: Tensor) -> Tensor:
        """The readout token's hidden state (B, D)."""
        readout_BLD = self.trunk.readout.expand(len(ids_BW), 1, -1)
        return self.trunk(images_BCHW, ids_BW, readout_BLD, LATENT_ACTION)[:, 0]

    def loss(self, images_BCHW: Tensor, ids_BW: Tensor, latent_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and numbers to log, for normalised latent actions (B, L) float32."""
        loss, numbers = self.latent_head.loss(self.hidden(images_BCHW, ids_BW), latent_BL)
        return with_auxiliary(loss, numbers, self.trunk)

    def predict(self, images_BCHW: Tensor, ids_BW: Tensor) -> Tensor:
        """Normalised latent actions (B, L)."""
        return self.latent_head(self.hidden(images_BCHW, ids_BW))


class ActionModel(nn.Module):
    """Trunk and action head: what finetuning trains and a policy runs."""

    def __init__(self, trunk: VisionLanguageTrunk, action_head: ReadoutActionHead):
        super().__init__()
        self.trunk = trunk
        self.action_head = action_head

    def hidden(self, images_BCHW: Tensor, ids_BW: Tensor) -> Tensor:
        """The readout token's hidden state (B, D)."""
        readout_BLD = self.trunk.readout.expand(len(ids_BW), 1, -1)
        return self.trunk(images_BCHW, ids_BW, readout_BLD, ROBOT_ACTION)[:, 0]

    def loss(
        self, images_BCHW: Tensor, ids_BW: Tensor, actions_BTA: Tensor, is_pad_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss a sample (B,) and numbers to log, for normalised actions (B, T, A)."""
        loss_B, numbers = self.action_head.loss(self.hidden(images_BCHW, ids_BW), actions_BTA, is_pad_BT)
        return with_auxiliary(loss_B, numbers, self.trunk)

    def decode(self, images_BCHW: Tensor, ids_BW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised actions (B, T, A), without sampling: the generator is not used."""
        return self.action_head.decode(self.hidden(images_BCHW, ids_BW))


class DenoisingActionModel(nn.Module):
    """Trunk and denoising head: the chunk's tokens follow the readout, as one block that sees itself both ways."""

    def __init__(self, trunk: VisionLanguageTrunk, action_head: DenoisingActionHead):
        super().__init__()
        self.trunk = trunk
        self.action_head = action_head

    def loss(
        self, images_BCHW: Tensor, ids_BW: Tensor, actions_BTA: Tensor, is_pad_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the prediction a sample (B,) and numbers to log, for normalised actions (B, T, A).

        Time and noise come from torch's own generator, which `lapa.trainer.fit` seeds and saves.
        """
        head = self.action_head
        time_B = head.process.draw_times(len(actions_BTA)).to(actions_BTA.device)
        noise_BTA = torch.randn_like(actions_BTA)
        tokens_BTD = head.tokens(head.process.corrupt(actions_BTA, noise_BTA, time_B), time_B)
        readout_B1D = self.trunk.readout.to(tokens_BTD.dtype).expand(len(ids_BW), 1, -1)
        hidden_BLD = self.trunk(
            images_BCHW,
            ids_BW,
            torch.cat([readout_B1D, tokens_BTD], dim=1),
            ROBOT_ACTION,
            block=torch.tensor([NO_BLOCK] + [DENOISED_BLOCK] * head.chunk_size),
            is_token_BL=torch.cat([torch.ones_like(is_pad_BT[:, :1]), ~is_pad_BT], dim=1),
        )
        target_BTA = head.process.target(actions_BTA, noise_BTA)
        error_BT = (head.read(hidden_BLD[:, 1:]) - target_BTA).square().mean(-1)
        loss_B = masked_mean(error_BT, is_pad_BT)
        return with_auxiliary(loss_B, {"denoising_loss": loss_B.detach().mean()}, self.trunk)

    @torch.no_grad()
    def decode(self, images_BCHW: Tensor, ids_BW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised actions (B, T, A).

        Args:
            generator: of the noise, on the CPU. None: every row starts from the same fixed noise, so that the chunk
                depends on image and instruction alone.
        """
        head, batch = self.action_head, len(ids_BW)
        if generator is None:
            fixed = torch.Generator().manual_seed(0)
            start_BTA = torch.randn(1, head.chunk_size, head.action_dim, generator=fixed).repeat(batch, 1, 1)
        else:
            start_BTA = torch.randn(batch, head.chunk_size, head.action_dim, generator=generator)
        cache = Cache()
        self.trunk(images_BCHW, ids_BW, self.trunk.readout.expand(batch, 1, -1), ROBOT_ACTION, cache)
        prefix_length = cache.length

        def predict(noised_BTA: Tensor, time_B: Tensor) -> Tensor:
            tokens_BTD = head.tokens(noised_BTA, time_B)
            hidden_BTD = self.trunk.extend(tokens_BTD, ROBOT_ACTION, cache, DENOISED_BLOCK)
            cache.truncate(prefix_length)
            return head.read(hidden_BTD)

        start_BTA = start_BTA.to(images_BCHW.device)
        return head.process.sample(predict, start_BTA, head.num_sampling_steps, head.limit_A, generator)


def build_action_model(trunk: VisionLanguageTrunk, action_head: ActionHead) -> ActionModel | DenoisingActionModel:
    """The model that runs this head."""
    if isinstance(action_head, DenoisingActionHead):
        return DenoisingActionModel(trunk, action_head)
    return ActionModel(trunk, action_head)


def build_trunk(
    backbone: schema.Backbone, text: schema.TextEncoder, image_tokenizer: str, image_size: int
) -> VisionLanguageTrunk:
    """The trunk of these parts; a model of transformers brings all of them at once."""
    if isinstance(backbone, schema.HuggingFaceBackbone):
        from lapa.latent_vla.huggingface import HuggingFaceTrunk

        return HuggingFaceTrunk(backbone, text, image_tokenizer, image_size)
    if image_tokenizer == "huggingface":
        raise ValueError("image_tokenizer=huggingface is a model's vision tower: it needs backbone=huggingface")
    return VisionLanguageTrunk(backbone, text, image_tokenizer, image_size)
