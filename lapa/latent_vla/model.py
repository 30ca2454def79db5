"""The latent vision-language-action model: a trunk over instruction, image and action tokens, and its heads.

    [ words | image tokens | robot state, readout, then latent action tokens ]
      see each other          see the prefix and what came before

After arXiv 2410.11758: pretrained to predict latent actions, then the latent head is dropped and an action
head reads the same readout token, or denoises a chunk of tokens that follow it. The robot's state, where it is used,
comes behind the prefix, which stays what it was in pretraining on video.

Shapes: B batch, W text ids, T text tokens or chunk size, I image tokens, L action tokens, S = T + I + L, D width,
A action dimensions, P state dimensions (proprioception).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lapa import schema
from lapa.backbones.base import (
    IMAGE,
    LATENT_ACTION,
    NO_BLOCK,
    PROPRIOCEPTION,
    ROBOT_ACTION,
    TEXT,
    Cache,
    Layout,
    build_backbone,
)
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
STATE_LIMIT = 10.0  # standard deviations from the mean


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
        modality: int | Tensor,
        cache: Cache | None = None,
        block: int | Tensor = NO_BLOCK,
        is_token_BL: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) of the action tokens.

        Args:
            images_BCHW: RGB in [0, 1], of the size the model was built for.
            ids_BW: of `encode_text`.
            action_BLD: embedded action tokens, the readout first, or behind the state.
            modality: LATENT_ACTION or ROBOT_ACTION; (L,) int64 says it of each token.
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
        modality: int | Tensor,
        block: int | Tensor = NO_BLOCK,
        is_token_BL: Tensor | None = None,
    ) -> Layout:
        """Action tokens that follow the tokens of `before`."""
        modality_ids_BL = torch.as_tensor(modality, device=action_BLD.device).expand(action_BLD.shape[:2])
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

    def __init__(self, trunk: VisionLanguageTrunk, num_codes: int, codebook_size: int, chunk_size: int = 1):
        super().__init__()
        self.trunk = trunk
        self.latent_head = LatentHead(trunk.width, num_codes, codebook_size, chunk_size)

    def hidden(self, images_BCHW: Tensor, ids_BW: Tensor, known_BL: Tensor) -> Tensor:
        """Hidden states (B, l + 1, D) after the l latent tokens known so far."""
        tokens_BLD = self.latent_head.tokens(self.trunk.readout, known_BL)
        return self.trunk(images_BCHW, ids_BW, tokens_BLD, LATENT_ACTION)

    def loss(self, images_BCHW: Tensor, ids_BW: Tensor, latent_BTL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and numbers to log, for chunks of latent actions (B, T, L) int64, as `LatentHead.loss`."""
        hidden_BLD = self.hidden(images_BCHW, ids_BW, latent_BTL[:, 0, :-1])
        loss, numbers = self.latent_head.loss(hidden_BLD, latent_BTL)
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


class StateToken(nn.Module):
    """The robot's state as a token: the readout token once more, and what a linear layer adds to it.

    The layer begins at zero, so that at first a pretrained trunk sees its own readout twice and no state at all.

    Args:
        dropout: share of the samples in training whose state is hidden, a cure for policies that copy it.
    """

    def __init__(self, state_dim: int, width: int, dropout: float = 0.0):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"state_dropout is {dropout}, expected a share of at least 0 and less than 1")
        self.state_dim, self.dropout = state_dim, dropout
        self.projection = nn.Linear(state_dim, width)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, state_BP: Tensor | None, readout_D: Tensor) -> Tensor:
        """(B, 1, D) for normalised states; ValueError where there are none, or of another size.

        A joint that hardly moved in the data is cut off at STATE_LIMIT where it moves on the robot.
        """
        if state_BP is None or state_BP.ndim != 2 or state_BP.shape[1] != self.state_dim:
            found = None if state_BP is None else tuple(state_BP.shape)
            raise ValueError(f"the state is {found}, this policy was trained with (B, {self.state_dim})")
        added_BD = self.projection(state_BP.clamp(-STATE_LIMIT, STATE_LIMIT))
        if self.training and self.dropout:
            is_hidden_B = (torch.rand(len(state_BP)) < self.dropout).to(added_BD.device)
            added_BD = added_BD.masked_fill(is_hidden_B[:, None], 0)
        return (readout_D + added_BD)[:, None]


class TrunkWithState(nn.Module):
    """What action models share: the trunk, a head, and the tokens that come before actions.

    Args:
        state_token: of a model that reads the robot's state; None: image and instruction are all it knows.
    """

    def __init__(self, trunk: VisionLanguageTrunk, action_head: ActionHead, state_token: StateToken | None = None):
        super().__init__()
        self.trunk = trunk
        self.action_head = action_head
        self.state_token = state_token

    def opening(self, batch_size: int, state_BP: Tensor | None) -> tuple[Tensor, list[int]]:
        """The tokens (B, 1 or 2, D) that come before actions, and their modalities: the readout, behind the state."""
        readout_B1D = self.trunk.readout.expand(batch_size, 1, -1)
        if self.state_token is None:
            return readout_B1D, [ROBOT_ACTION]
        state_B1D = self.state_token(state_BP, self.trunk.readout)
        return torch.cat([state_B1D, readout_B1D.to(state_B1D.dtype)], dim=1), [PROPRIOCEPTION, ROBOT_ACTION]

    def hidden(
        self, images_BCHW: Tensor, ids_BW: Tensor, state_BP: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The readout token's hidden state (B, D)."""
        tokens_BLD, modalities = self.opening(len(ids_BW), state_BP)
        return self.trunk(images_BCHW, ids_BW, tokens_BLD, torch.tensor(modalities), cache)[:, -1]


class ActionModel(TrunkWithState):
    """Trunk and action head: what finetuning trains and a policy runs."""

    action_head: ReadoutActionHead

    def loss(
        self,
        images_BCHW: Tensor,
        ids_BW: Tensor,
        actions_BTA: Tensor,
        is_pad_BT: Tensor,
        state_BP: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss a sample (B,) and numbers to log, for normalised actions (B, T, A) and states (B, P)."""
        hidden_BD = self.hidden(images_BCHW, ids_BW, state_BP)
        loss_B, numbers = self.action_head.loss(hidden_BD, actions_BTA, is_pad_BT)
        return with_auxiliary(loss_B, numbers, self.trunk)

    def decode(
        self,
        images_BCHW: Tensor,
        ids_BW: Tensor,
        generator: torch.Generator | None = None,
        state_BP: Tensor | None = None,
    ) -> Tensor:
        """Normalised actions (B, T, A), without sampling: the generator is not used."""
        return self.action_head.decode(self.hidden(images_BCHW, ids_BW, state_BP))


class DenoisingActionModel(TrunkWithState):
    """Trunk and denoising head: the chunk's tokens follow the readout, as one block that sees itself both ways."""

    action_head: DenoisingActionHead

    def loss(
        self,
        images_BCHW: Tensor,
        ids_BW: Tensor,
        actions_BTA: Tensor,
        is_pad_BT: Tensor,
        state_BP: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the prediction a sample (B,) and numbers to log, for normalised actions (B, T, A).

        Time and noise come from torch's own generator, which `lapa.trainer.fit` seeds and saves.
        """
        head = self.action_head
        time_B = head.process.draw_times(len(actions_BTA)).to(actions_BTA.device)
        noise_BTA = torch.randn_like(actions_BTA)
        tokens_BTD = head.tokens(head.process.corrupt(actions_BTA, noise_BTA, time_B), time_B)
        opening_BLD, modalities = self.opening(len(ids_BW), state_BP)
        num_before = len(modalities)
        is_opening_BL = torch.ones_like(is_pad_BT[:, :1]).expand(-1, num_before)
        hidden_BLD = self.trunk(
            images_BCHW,
            ids_BW,
            torch.cat([opening_BLD.to(tokens_BTD.dtype), tokens_BTD], dim=1),
            torch.tensor(modalities + [ROBOT_ACTION] * head.chunk_size),
            block=torch.tensor([NO_BLOCK] * num_before + [DENOISED_BLOCK] * head.chunk_size),
            is_token_BL=torch.cat([is_opening_BL, ~is_pad_BT], dim=1),
        )
        target_BTA = head.process.target(actions_BTA, noise_BTA)
        error_BT = (head.read(hidden_BLD[:, num_before:]) - target_BTA).square().mean(-1)
        loss_B = masked_mean(error_BT, is_pad_BT)
        return with_auxiliary(loss_B, {"denoising_loss": loss_B.detach().mean()}, self.trunk)

    @torch.no_grad()
    def decode(
        self,
        images_BCHW: Tensor,
        ids_BW: Tensor,
        generator: torch.Generator | None = None,
        state_BP: Tensor | None = None,
    ) -> Tensor:
        """Normalised actions (B, T, A).

        Args:
            generator: of the noise, on the CPU. None: every row starts from the same fixed noise, so that the chunk
                depends on the observation alone.
        """
        head, batch = self.action_head, len(ids_BW)
        if generator is None:
            fixed = torch.Generator().manual_seed(0)
            start_BTA = torch.randn(1, head.chunk_size, head.action_dim, generator=fixed).repeat(batch, 1, 1)
        else:
            start_BTA = torch.randn(batch, head.chunk_size, head.action_dim, generator=generator)
        cache = Cache()
        self.hidden(images_BCHW, ids_BW, state_BP, cache)
        prefix_length = cache.length

        def predict(noised_BTA: Tensor, time_B: Tensor) -> Tensor:
            tokens_BTD = head.tokens(noised_BTA, time_B)
            hidden_BTD = self.trunk.extend(tokens_BTD, ROBOT_ACTION, cache, DENOISED_BLOCK)
            cache.truncate(prefix_length)
            return head.read(hidden_BTD)

        start_BTA = start_BTA.to(images_BCHW.device)
        return head.process.sample(predict, start_BTA, head.num_sampling_steps, head.limit_A, generator)


def build_action_model(
    trunk: VisionLanguageTrunk, action_head: ActionHead, state_token: StateToken | None = None
) -> ActionModel | DenoisingActionModel:
    """The model that runs this head."""
    if isinstance(action_head, DenoisingActionHead):
        return DenoisingActionModel(trunk, action_head, state_token)
    return ActionModel(trunk, action_head, state_token)


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
