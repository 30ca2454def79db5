"""The latent vision-language-action model: a trunk over instruction, image and action tokens, and its heads.

    [ words | image tokens | readout, then latent action tokens ]
      see each other          see the prefix and what came before

After arXiv 2410.11758: pretrained to predict latent actions, then the latent head is dropped and an action
head reads the same readout token.

Shapes: B batch, W words, I image tokens, L action tokens, S = W + I + L, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa import schema
from lapa.backbones.base import IMAGE, LATENT_ACTION, ROBOT_ACTION, TEXT, build_backbone
from lapa.latent_vla.heads import ActionHead, ContinuousLatentHead, LatentHead
from lapa.latent_vla.vision import build_image_tokenizer
from lapa.text import PADDING_ID, TEXT_VOCABULARY


def prefix_mask(is_word_BW: Tensor, num_image_tokens: int, num_action_tokens: int) -> Tensor:
    """(B, S, S) bool, True where the row may look at the column.

    Words and image see each other both ways and no action token; action tokens see the prefix and
    themselves causally; nobody sees padding.
    """
    num_words = is_word_BW.shape[1]
    prefix = num_words + num_image_tokens
    size = prefix + num_action_tokens
    position = torch.arange(size, device=is_word_BW.device)
    visible_SS = (position[None] < prefix) | (position[None] <= position[:, None])
    is_token_BS = torch.ones(len(is_word_BW), size, dtype=torch.bool, device=is_word_BW.device)
    is_token_BS[:, :num_words] = is_word_BW
    return visible_SS & is_token_BS[:, None]


class VisionLanguageTrunk(nn.Module):
    """Everything that pretraining passes on to finetuning."""

    def __init__(self, backbone: schema.Backbone, image_tokenizer: str, image_size: int, max_text_tokens: int):
        super().__init__()
        width = backbone.width
        self.width = width
        self.word_embedding = nn.Embedding(TEXT_VOCABULARY, width, padding_idx=PADDING_ID)
        self.word_position = nn.Parameter(torch.randn(max_text_tokens, width) * 0.02)
        self.image_tokenizer = build_image_tokenizer(image_tokenizer, image_size, width)
        self.readout = nn.Parameter(torch.randn(width))
        self.backbone = build_backbone(backbone)

    def forward(self, images_BCHW: Tensor, words_BW: Tensor, action_BLD: Tensor, modality: int) -> Tensor:
        """Hidden states (B, L, D) of the action tokens.

        Args:
            images_BCHW: RGB in [0, 1], of the size the model was built for.
            words_BW: ids of `encode_text`.
            action_BLD: embedded action tokens, the readout first.
            modality: LATENT_ACTION or ROBOT_ACTION.
        """
        size = self.image_tokenizer.image_size
        if images_BCHW.shape[-2:] != (size, size):
            raise ValueError(f"images are {tuple(images_BCHW.shape)}, expected (B, 3, {size}, {size}): resize them")
        # Columns that are padding in the whole batch cost time and change nothing.
        words_BW = words_BW[:, : max(1, int((words_BW != PADDING_ID).sum(1).max()))]
        num_words, num_actions = words_BW.shape[1], action_BLD.shape[1]
        is_word_BW = words_BW != PADDING_ID
        words_BWD = self.word_embedding(words_BW)
        instruction_BD = F.rms_norm(words_BWD.sum(1), (self.width,))
        image_BID = self.image_tokenizer(images_BCHW, instruction_BD)
        words_BWD = words_BWD + self.word_position[:num_words]
        num_image = image_BID.shape[1]
        tokens_BSD = torch.cat([words_BWD, image_BID.to(words_BWD.dtype), action_BLD.to(words_BWD.dtype)], dim=1)
        modality_ids_S = torch.tensor(
            [TEXT] * num_words + [IMAGE] * num_image + [modality] * num_actions, device=words_BW.device
        )
        mask_BSS = prefix_mask(is_word_BW, num_image, num_actions)
        hidden_BSD = self.backbone(tokens_BSD, modality_ids_S.expand(len(tokens_BSD), -1), mask_BSS)
        return hidden_BSD[:, -num_actions:]


class LatentActionModel(nn.Module):
    """Trunk and latent head: what `lapa pretrain` trains on labels that are codes."""

    def __init__(self, trunk: VisionLanguageTrunk, num_codes: int, codebook_size: int):
        super().__init__()
        self.trunk = trunk
        self.latent_head = LatentHead(trunk.width, num_codes, codebook_size)

    def hidden(self, images_BCHW: Tensor, words_BW: Tensor, known_BL: Tensor) -> Tensor:
        """Hidden states (B, l + 1, D) after the l latent tokens known so far."""
        tokens_BLD = self.latent_head.tokens(self.trunk.readout, known_BL)
        return self.trunk(images_BCHW, words_BW, tokens_BLD, LATENT_ACTION)

    def loss(self, images_BCHW: Tensor, words_BW: Tensor, latent_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and numbers to log, for latent actions (B, L) int64."""
        return self.latent_head.loss(self.hidden(images_BCHW, words_BW, latent_BL[:, :-1]), latent_BL)

    @torch.no_grad()
    def generate(self, images_BCHW: Tensor, words_BW: Tensor) -> Tensor:
        """Greedy latent actions (B, L) int64."""
        latent_BL = words_BW.new_zeros(len(words_BW), 0)
        for _ in range(self.latent_head.num_codes):
            logits_BLK = self.latent_head.logits(self.hidden(images_BCHW, words_BW, latent_BL))
            latent_BL = torch.cat([latent_BL, logits_BLK[:, -1:].argmax(-1)], dim=1)
        return latent_BL


class ContinuousLatentModel(nn.Module):
    """Trunk and continuous latent head: what `lapa pretrain` trains on labels that are numbers."""

    def __init__(self, trunk: VisionLanguageTrunk, num_codes: int):
        super().__init__()
        self.trunk = trunk
        self.latent_head = ContinuousLatentHead(trunk.width, num_codes)

    def hidden(self, images_BCHW: Tensor, words_BW: Tensor) -> Tensor:
        """The readout token's hidden state (B, D)."""
        readout_BLD = self.trunk.readout.expand(len(words_BW), 1, -1)
        return self.trunk(images_BCHW, words_BW, readout_BLD, LATENT_ACTION)[:, 0]

    def loss(self, images_BCHW: Tensor, words_BW: Tensor, latent_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and numbers to log, for normalised latent actions (B, L) float32."""
        return self.latent_head.loss(self.hidden(images_BCHW, words_BW), latent_BL)

    def predict(self, images_BCHW: Tensor, words_BW: Tensor) -> Tensor:
        """Normalised latent actions (B, L)."""
        return self.latent_head(self.hidden(images_BCHW, words_BW))


class ActionModel(nn.Module):
    """Trunk and action head: what finetuning trains and a policy runs."""

    def __init__(self, trunk: VisionLanguageTrunk, action_head: ActionHead):
        super().__init__()
        self.trunk = trunk
        self.action_head = action_head

    def hidden(self, images_BCHW: Tensor, words_BW: Tensor) -> Tensor:
        """The readout token's hidden state (B, D)."""
        readout_BLD = self.trunk.readout.expand(len(words_BW), 1, -1)
        return self.trunk(images_BCHW, words_BW, readout_BLD, ROBOT_ACTION)[:, 0]

    def loss(
        self, images_BCHW: Tensor, words_BW: Tensor, actions_BTA: Tensor, is_pad_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss a sample (B,) and numbers to log, for normalised actions (B, T, A)."""
        return self.action_head.loss(self.hidden(images_BCHW, words_BW), actions_BTA, is_pad_BT)

    def decode(self, images_BCHW: Tensor, words_BW: Tensor) -> Tensor:
        """Normalised actions (B, T, A), without sampling."""
        return self.action_head.decode(self.hidden(images_BCHW, words_BW))
