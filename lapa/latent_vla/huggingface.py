"""The trunk whose language model, vocabulary and vision tower come from one model of transformers.

    [ prompt before the image | image tokens | prompt behind it | readout, then action tokens ]

One model gives three parts, which are loaded once and share more than embeddings: the prompt says where the image
stands, its grid gives the positions of its tokens (Qwen-VL), and some layers of the language model take in features of
the vision tower (Qwen3-VL). Hence one trunk that knows of all three. Text encoder and image tokenizer can also be ours:
`text=words`, `image_tokenizer=keypoints` (needed for a language model without vision, such as LAPA-7B).

Shapes: as in `lapa.latent_vla.model`.
"""

import torch
from torch import Tensor, nn

from lapa import schema
from lapa.backbones.base import IMAGE, TEXT, Layout
from lapa.backbones.huggingface import HuggingFaceBackbone, Parts, load_parts
from lapa.backbones.huggingface_inputs import HuggingFaceImages, HuggingFaceText
from lapa.backbones.text import build_text_encoder
from lapa.latent_vla.model import PREFIX_BLOCK, VisionLanguageTrunk
from lapa.latent_vla.vision import build_image_tokenizer


class HuggingFaceTrunk(VisionLanguageTrunk):
    """A trunk from a model of transformers; behaves as every trunk."""

    backbone: HuggingFaceBackbone
    image_tokenizer: nn.Module

    def __init__(
        self, backbone: schema.HuggingFaceBackbone, text: schema.TextEncoder, image_tokenizer: str, image_size: int
    ):
        nn.Module.__init__(self)
        parts = load_parts(backbone)
        self.backbone = HuggingFaceBackbone(parts.config, parts)
        self.width = self.backbone.width
        # New tokens as large as the words that the layers know.
        self.readout = nn.Parameter(torch.randn(self.width) * embedding_scale(parts))
        if isinstance(text, schema.HuggingFaceText):
            self.text_encoder = HuggingFaceText(text, self.width, parts)
        else:
            self.text_encoder = build_text_encoder(text, self.width)
        if image_tokenizer == "huggingface":
            self.image_tokenizer = HuggingFaceImages(parts, image_size)
            self.backbone.image_grid = self.image_tokenizer.grid
        else:
            self.image_tokenizer = build_image_tokenizer(image_tokenizer, image_size, self.width)

    def prefix(self, images_BCHW: Tensor, ids_BW: Tensor) -> tuple[Tensor, Layout]:
        """Embeddings (B, T + I, D) of prompt and image in the model's order, one block, and their layout."""
        size = self.image_tokenizer.image_size
        if images_BCHW.shape[-2:] != (size, size):
            raise ValueError(f"images are {tuple(images_BCHW.shape)}, expected (B, 3, {size}, {size}): resize them")
        if isinstance(self.text_encoder, HuggingFaceText):
            text, num_before = self.text_encoder.split(ids_BW)
        else:
            text = self.text_encoder(ids_BW)
            num_before = text.tokens_BTD.shape[1]
        if isinstance(self.image_tokenizer, HuggingFaceImages):
            image_BID, deep = self.image_tokenizer.encode(images_BCHW)
            if deep:
                self.backbone.hand_over(image_BID, deep)
        else:
            image_BID = self.image_tokenizer(images_BCHW, text.summary_BD)
        before, behind = slice(None, num_before), slice(num_before, None)

        def around(text_BT: Tensor, image_BI: Tensor) -> Tensor:
            return torch.cat([text_BT[:, before], image_BI.to(text_BT.dtype), text_BT[:, behind]], dim=1)

        is_image_BI = text.is_token_BT.new_ones(image_BID.shape[:2])
        modality_ids_BS = around(
            torch.full_like(text.is_token_BT, TEXT, dtype=torch.int64),
            torch.full_like(is_image_BI, IMAGE, dtype=torch.int64),
        )
        layout = Layout.of(
            modality_ids_BS,
            block_ids_BS=torch.full_like(modality_ids_BS, PREFIX_BLOCK),
            is_token_BS=around(text.is_token_BT, is_image_BI),
        )
        return around(text.tokens_BTD, image_BID), layout


@torch.no_grad()
def embedding_scale(parts: Parts) -> float:
    """Root mean square of the model's embeddings, over its first thousand words."""
    embedding: nn.Embedding = parts.embedding  # type: ignore[assignment]
    ids = torch.arange(min(1000, embedding.num_embeddings), device=embedding.weight.device)
    return float(embedding(ids).float().square().mean().sqrt())
