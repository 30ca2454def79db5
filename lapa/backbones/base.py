"""The backbone contract: embeddings and a description of the sequence in, hidden states out.

    hidden_BSD = backbone(tokens_BSD, layout)                 the whole sequence
    hidden_BSD = backbone(tokens_BSD, layout, cache)          the next tokens; keys and values of earlier ones are kept

`Layout` says of every token what it is (modality), which packed sequence it belongs to (document), and with which
tokens it is seen as a whole (block). `backbone.mask` turns that into who looks at whom:

    causal          a token looks at itself and what came before, in its document
    bidirectional   at everything in its document
    block_causal    causal, and both ways within a block: an image, the prefix of a policy, a chunk that is denoised

Image positions come with the embeddings; a backbone with rotary positions adds the order of the tokens.

Shapes: B batch, S sequence, P past (cached tokens), D width, N heads, H width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor, nn

from lapa import schema

TEXT, IMAGE, LATENT_ACTION, PROPRIOCEPTION, ROBOT_ACTION = range(5)
NUM_MODALITIES = 5
MODALITY_NAMES = ("text", "image", "latent_action", "proprioception", "robot_action")

NO_BLOCK = -1  # a token that is in no block
PADDING_DOCUMENT = -1  # a token that nobody sees

# The name in the configuration, the module that holds the model, and its class.
BACKBONES: dict[str, tuple[str, str]] = {
    "dense": ("lapa.backbones.dense", "DenseTransformer"),
    "mot": ("lapa.backbones.mot", "MoTTransformer"),
    "moma": ("lapa.backbones.moma", "MoMaTransformer"),
    "memory": ("lapa.backbones.memory", "MemoryTransformer"),
    "huggingface": ("lapa.backbones.huggingface", "HuggingFaceBackbone"),
    "mot_memory": ("lapa.backbones.memory", "MoTMemoryTransformer"),
}


@dataclass(frozen=True)
class Layout:
    """What the tokens of a batch are: four tensors (B, S) int64.

    modality_ids: one of the constants above.
    document_ids: tokens see their own document only, PADDING_DOCUMENT is seen by nobody; ids are >= 0 otherwise.
    block_ids: tokens of one document with the same id >= 0 see each other both ways; NO_BLOCK for none.
    position_ids: the order of the tokens, padding not counted.
    """

    modality_ids_BS: Tensor
    document_ids_BS: Tensor
    block_ids_BS: Tensor
    position_ids_BS: Tensor

    @staticmethod
    def of(
        modality_ids_BS: Tensor,
        block_ids_BS: Tensor | None = None,
        is_token_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        first_position: int | Tensor = 0,
    ) -> "Layout":
        """A layout with what is not given filled in: one document, no block, no padding.

        Args:
            is_token_BS: bool, False for padding.
            first_position: of the first token, or (B,) one a row, where earlier tokens are cached.
        """
        modality_ids_BS = modality_ids_BS.long()
        if document_ids_BS is None:
            document_ids_BS = torch.zeros_like(modality_ids_BS)
        if is_token_BS is not None:
            document_ids_BS = document_ids_BS.masked_fill(~is_token_BS, PADDING_DOCUMENT)
        if block_ids_BS is None:
            block_ids_BS = torch.full_like(modality_ids_BS, NO_BLOCK)
        if isinstance(first_position, Tensor):
            first_position = first_position[:, None]
        position_ids_BS = (document_ids_BS != PADDING_DOCUMENT).cumsum(1) - 1 + first_position
        return Layout(modality_ids_BS, document_ids_BS, block_ids_BS, position_ids_BS.clamp(min=0))

    @property
    def is_token_BS(self) -> Tensor:
        """Bool, False for padding."""
        return self.document_ids_BS != PADDING_DOCUMENT

    def select(self, index_BS: Tensor) -> "Layout":
        """The layout of the tokens in another order, or of some of them."""
        return Layout(*(ids_BS.gather(1, index_BS) for ids_BS in self._tensors()))

    def __getitem__(self, index) -> "Layout":
        """The layout of a part: `layout[:, 3:]`, `layout[rows]`."""
        return Layout(*(ids_BS[index] for ids_BS in self._tensors()))

    def then(self, other: "Layout") -> "Layout":
        """This layout, followed by another."""
        return Layout(*(torch.cat(pair, dim=1) for pair in zip(self._tensors(), other._tensors(), strict=True)))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.modality_ids_BS, self.document_ids_BS, self.block_ids_BS, self.position_ids_BS


def attention_mask(queries: Layout, keys: Layout, kind: str) -> Tensor:
    """(B, Q, K) bool, True where the query may look at the key.

    The queries are the last Q of the K keys. A padding token looks at itself alone, so that no row is empty.
    """
    num_queries, num_keys = queries.modality_ids_BS.shape[1], keys.modality_ids_BS.shape[1]
    key = torch.arange(num_keys, device=keys.modality_ids_BS.device)
    query = key[num_keys - num_queries :]
    document_BQ, document_BK = queries.document_ids_BS, keys.document_ids_BS
    same_document_BQK = (document_BQ[:, :, None] == document_BK[:, None]) & (document_BK != PADDING_DOCUMENT)[:, None]
    itself_QK = query[:, None] == key
    if kind == "bidirectional":
        return same_document_BQK | itself_QK
    past_QK = query[:, None] >= key
    if kind == "causal":
        return (same_document_BQK & past_QK) | itself_QK
    if kind == "block_causal":
        block_BQ, block_BK = queries.block_ids_BS, keys.block_ids_BS
        same_block_BQK = (block_BQ[:, :, None] == block_BK[:, None]) & (block_BK != NO_BLOCK)[:, None]
        return (same_document_BQK & (past_QK | same_block_BQK)) | itself_QK
    raise ValueError(f"mask is {kind!r}, expected causal, bidirectional or block_causal")


@dataclass
class Cache:
    """Keys and values of the tokens that were seen, a layer each, and their layout.

    A block must arrive whole: its tokens see each other, and later ones are not there yet.
    """

    layout: Layout | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)  # layer to (B, N, P, H)
    values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of tokens that are cached."""
        return 0 if self.layout is None else self.layout.modality_ids_BS.shape[1]

    def extend(self, layer: int, keys_BNSH: Tensor, values_BNSH: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values of a layer; all of them (B, N, P + S, H) are returned."""
        if layer in self.keys:
            keys_BNSH = torch.cat([self.keys[layer], keys_BNSH], dim=2)
            values_BNSH = torch.cat([self.values[layer], values_BNSH], dim=2)
        self.keys[layer], self.values[layer] = keys_BNSH, values_BNSH
        return keys_BNSH, values_BNSH

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, as after each step of denoising a block."""
        if self.layout is None or length >= self.length:
            return
        self.layout = self.layout[:, :length]
        for layer in self.keys:
            self.keys[layer], self.values[layer] = self.keys[layer][:, :, :length], self.values[layer][:, :, :length]


class Backbone(nn.Module):
    """What every backbone is. Subclasses implement `forward` and `forward_flops`.

    Attributes:
        width: D of the embeddings and the hidden states.
        mask: causal, bidirectional or block_causal.
    """

    def __init__(self, config: schema.Backbone):
        super().__init__()
        self.config = config
        self.width = config.width
        self.mask = config.mask

    def forward(self, tokens_BSD: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Hidden states (B, S, D), normalised, from embeddings (B, S, D).

        With a cache, the tokens follow those in it, which they see; the cache then holds them too.
        """
        raise NotImplementedError

    def forward_flops(self, modality_lengths: Sequence[int]) -> int:
        """Floating-point operations of one forward pass over one sequence, by torch.utils.flop_counter's rules.

        A multiply-add is two, attention is counted in full whatever the mask, look-ups and pointwise maths are free.

        Args:
            modality_lengths: number of tokens of each of the NUM_MODALITIES modalities.
        """
        raise NotImplementedError

    def num_parameters(self) -> int:
        """All parameters, active for a token or not."""
        return sum(parameter.numel() for parameter in self.parameters())

    def auxiliary_loss(self) -> Tensor | None:
        """What the last forward pass in training adds to the loss (routers); None for most."""
        return None


def see(queries: Layout, cache: Cache | None, mask: str) -> Tensor:
    """(B, Q, P + Q) bool, who looks at whom; enters the new tokens' layout into the cache."""
    keys = queries if cache is None or cache.layout is None else cache.layout.then(queries)
    if cache is not None:
        cache.layout = keys
    return attention_mask(queries, keys, mask)


def build_backbone(config: schema.Backbone) -> Backbone:
    """The backbone that `config.name` names, with random weights; ValueError for a name we do not know."""
    if config.name not in BACKBONES:
        raise ValueError(f"unknown backbone {config.name!r}: known are {sorted(BACKBONES)}")
    module, class_name = BACKBONES[config.name]
    return getattr(import_module(module), class_name)(config)
