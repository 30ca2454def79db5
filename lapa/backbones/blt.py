"""Text without a tokenizer: plain bytes, and the byte latent transformer (Pagnoni et al. 2024, arXiv 2412.09871).

Bytes become vectors (an embedding, and those of the n-grams that end there, by hashing) and pass a few causal layers.
A byte latent transformer then cuts them into patches (lapa/backbones/patchers.py) and lets a few queries a patch look
at the bytes of their own patch. Most of the compute goes to a model over the patches:

    BltEncoder               text encoder of a policy: the patch vectors are tokens of the policy's own backbone
    ByteLatentTransformer    language model: a global Llama over patches, and a decoder back to bytes
    ByteEncoder              the control: the same without patches, one token a byte

Which byte begins a patch is found where texts become ids, on the CPU, and travels in the ids.

Shapes: B batch, S bytes, P patches, K queries a patch, C width of byte states, D width of the backbone, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa import schema
from lapa.backbones.base import TEXT, Layout
from lapa.backbones.byte_entropy import ByteModel, byte_layout, train_byte_model
from lapa.backbones.dense import DenseTransformer, attend
from lapa.backbones.patchers import (
    VOCABULARY,
    boundary_scores,
    choose_theta,
    encode_bytes,
    entropy_starts,
    pack,
    patch_of_byte,
    space_starts,
    static_starts,
    unpack,
    utf8,
)
from lapa.backbones.text import EncodedText, TextEncoder, without_empty_columns
from lapa.text import PADDING_ID

HASH_PRIME = 1_000_000_007
ROTARY_THETA = 5e5  # of the released model
SMALLEST_NGRAM = 3
PATCHERS = ("entropy", "space", "static")


def truncated_normal(module: nn.Module) -> None:
    """Weights of standard deviation fan_in^-0.5, cut at three of them; embeddings by their width."""
    for weight in module.parameters():
        if weight.ndim == 2:
            deviation = weight.shape[1] ** -0.5
            nn.init.trunc_normal_(weight, std=deviation, a=-3 * deviation, b=3 * deviation)


def ngram_hashes(ids_BS: Tensor, size: int, table_size: int) -> Tensor:
    """(B, S) in [0, table_size): of the `size` ids that end at each byte, zeros before the first.

    A rolling polynomial hash, sum of id_j * HASH_PRIME^j in int64 that wraps around.
    """
    windows_BSN = F.pad(ids_BS, (size - 1, 0)).unfold(1, size, 1)
    powers = [pow(HASH_PRIME, j, 2**64) for j in range(size)]
    signed = [power - 2**64 if power >= 2**63 else power for power in powers]
    return (windows_BSN * torch.tensor(signed, device=ids_BS.device)).sum(-1) % table_size


class ByteStates(nn.Module):
    """Ids (B, S) to byte states (B, S, C): embedding, hashed n-grams, causal layers."""

    def __init__(self, config: schema.ByteText):
        super().__init__()
        self.table_size = config.ngram_table_size
        self.ngram_sizes = range(SMALLEST_NGRAM, config.max_ngram + 1)
        self.embedding = nn.Embedding(VOCABULARY, config.byte_width)
        if self.ngram_sizes:
            self.ngram_embedding = nn.Embedding(len(self.ngram_sizes) * self.table_size, config.byte_width)
        truncated_normal(self)
        self.layers = ByteLayers(byte_backbone(config, config.num_byte_layers))

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSC = self.embedding(ids_BS)
        for index, size in enumerate(self.ngram_sizes):
            hashes_BS = ngram_hashes(ids_BS, size, self.table_size)
            x_BSC = x_BSC + self.ngram_embedding(hashes_BS + index * self.table_size)
        return self.layers(x_BSC, byte_layout(ids_BS))


def byte_backbone(config: schema.ByteText, num_layers: int) -> schema.DenseBackbone:
    """Layers over bytes: Llama blocks."""
    return schema.DenseBackbone(
        width=config.byte_width,
        num_layers=num_layers,
        num_heads=config.num_byte_heads,
        mask="causal",
        query_key_norm=False,
        rotary_theta=ROTARY_THETA,
    )


class ByteLayers(DenseTransformer):
    """Llama blocks whose last residual stream is not normalised: what reads it does that."""

    def __init__(self, config: schema.DenseBackbone):
        super().__init__(config)
        self.norm = nn.Identity()  # type: ignore[assignment]

    def initialise(self) -> None:
        truncated_normal(self)


class CrossAttention(nn.Module):
    """Queries look at other states; both sides are normalised over their whole width, and have no positions."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_norm, self.key_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        truncated_normal(self)

    def forward(self, x_BQC: Tensor, states_BKC: Tensor, mask_BQK: Tensor) -> Tensor:
        """(B, Q, C); mask_BQK is True where the query may look, and no row of it is empty."""
        q_BNQH = self.query(self.query_norm(x_BQC)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key_value_BKC = self.key_value(self.key_norm(states_BKC))
        k_BNKH, v_BNKH = key_value_BKC.unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2).chunk(2, dim=1)
        # The released model adds the residual inside and outside of its cross-attention, and was trained so.
        return 2 * x_BQC + self.output(attend(q_BNQH, k_BNKH, v_BNKH, mask_BQK[:, None]))


class PatchEncoder(nn.Module):
    """Byte states to patch vectors (B, P, K * C): their maximum makes K queries, which look at the patch's bytes."""

    def __init__(self, config: schema.BltText):
        super().__init__()
        self.queries_per_patch = config.queries_per_patch
        self.queries = nn.Linear(config.byte_width, config.queries_per_patch * config.byte_width, bias=False)
        truncated_normal(self)
        self.cross_attention = CrossAttention(config.byte_width, config.num_byte_heads)

    def forward(self, states_BSC: Tensor, patch_BS: Tensor, is_byte_BS: Tensor) -> Tensor:
        num_patches = int(patch_BS.max()) + 1
        # Padding goes to a patch behind the last one, which is dropped.
        patch_BS = patch_BS.masked_fill(~is_byte_BS, num_patches)
        pooled_BPC = states_BSC.new_zeros(len(states_BSC), num_patches + 1, states_BSC.shape[-1]).scatter_reduce(
            1, patch_BS[..., None].expand_as(states_BSC), states_BSC, reduce="amax", include_self=False
        )[:, :-1]
        queries_BQC = self.queries(pooled_BPC).unflatten(-1, (self.queries_per_patch, -1)).flatten(1, 2)
        patches = torch.arange(num_patches, device=patch_BS.device)
        own_BPS = patches[None, :, None] == patch_BS[:, None]
        # A patch that a shorter text lacks looks at byte 0, so that no row is empty.
        own_BPS[..., 0] |= ~own_BPS.any(-1)
        mask_BQS = own_BPS.repeat_interleave(self.queries_per_patch, dim=1)
        attended_BQC = self.cross_attention(queries_BQC, states_BSC, mask_BQS)
        return attended_BQC.unflatten(1, (num_patches, self.queries_per_patch)).flatten(2)


class ByteEncoder(TextEncoder):
    """One token a byte."""

    def __init__(self, config: schema.ByteText, width: int, vector_width: int | None = None):
        super().__init__()
        if config.byte_width % config.num_byte_heads:
            raise ValueError(
                f"text.byte_width is {config.byte_width}, not a multiple of num_byte_heads {config.num_byte_heads}"
            )
        self.config, self.width = config, width
        self.byte_states = ByteStates(config)
        self.projection = nn.Linear(vector_width or config.byte_width, width, bias=False)
        self.norm = nn.RMSNorm(width)
        self.position = nn.Parameter(torch.randn(config.max_bytes + 1, width) * 0.02)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return encode_bytes(texts, self.config.max_bytes, self.config.lower_case)

    def count_longer(self, texts: Sequence[str]) -> int:
        return sum(len(utf8(text, self.config.lower_case)) > self.config.max_bytes for text in texts)

    def vectors(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """A vector a token (B, T, width), and which of them are tokens (B, T) bool."""
        return self.byte_states(ids_BS), ids_BS != PADDING_ID

    def forward(self, ids_BW: Tensor) -> EncodedText:
        vectors_BTC, is_token_BT = self.vectors(without_empty_columns(ids_BW))
        tokens_BTD = self.norm(self.projection(vectors_BTC)).masked_fill(~is_token_BT[..., None], 0)
        return EncodedText(
            tokens_BTD=tokens_BTD + self.position[: tokens_BTD.shape[1]],
            is_token_BT=is_token_BT,
            summary_BD=F.rms_norm(tokens_BTD.sum(1), (self.width,)),
        )


class BltEncoder(ByteEncoder):
    """One token a patch of bytes.

    `fit` teaches the patcher's byte model the data's texts; its weights and the threshold are part of the state, so a
    model folder needs nothing else.
    """

    theta: Tensor

    def __init__(self, config: schema.BltText, width: int):
        super().__init__(config, width, vector_width=config.queries_per_patch * config.byte_width)
        self.patching = config
        self.patch_encoder = PatchEncoder(config)
        if config.patcher not in PATCHERS:
            raise ValueError(f"text.patcher is {config.patcher!r}, expected one of {', '.join(PATCHERS)}")
        self.byte_model = None
        if config.patcher == "entropy":
            boundary_scores(torch.zeros(1, 1), config.entropy_rule)  # refuses an unknown rule
            self.byte_model = ByteModel(config.entropy_width, config.num_entropy_layers, config.num_entropy_heads)
            self.byte_model.requires_grad_(False)
            # In nats; not a number before `fit`.
            self.register_buffer("theta", torch.tensor(torch.nan))

    def fit(self, texts: Sequence[str], seed: int) -> None:
        if self.byte_model is None:
            return
        ids_BS = without_empty_columns(super().encode_text(sorted(set(texts))))
        train_byte_model(self.byte_model, ids_BS, self.patching.entropy_steps, seed)
        self.theta.fill_(choose_theta(self.scores(ids_BS), ids_BS, self.patching.mean_patch_bytes))

    def scores(self, ids_BS: Tensor) -> Tensor:
        """(B, S) on the CPU: a patch begins after the bytes where it is above theta."""
        assert self.byte_model is not None
        return boundary_scores(self.byte_model.entropies(ids_BS), self.patching.entropy_rule)

    def starts(self, ids_BS: Tensor) -> Tensor:
        """Bool (B, S): where patches begin."""
        if self.patching.patcher == "static":
            return static_starts(ids_BS, round(self.patching.mean_patch_bytes))
        if self.patching.patcher == "space":
            return space_starts(ids_BS)
        theta = float(self.theta)
        if theta != theta:
            raise ValueError(
                "the byte model that finds patches is not trained: `lapa pretrain` and `lapa finetune` train it on the "
                "data's instructions; elsewhere call the text encoder's fit(texts, seed), or set text.patcher=space"
            )
        return entropy_starts(self.scores(ids_BS), theta, ids_BS)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        # A batch of frames repeats few instructions, and the byte model is the costly part.
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        ids_BS = super().encode_text(list(row_of))
        starts_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        filled_BS = without_empty_columns(ids_BS)
        starts_BS[:, : filled_BS.shape[1]] = self.starts(filled_BS)
        return pack(ids_BS, starts_BS)[[row_of[text] for text in texts]]

    def vectors(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        ids_BS, starts_BS = unpack(ids_BS)
        patches_BPC = self.patch_encoder(self.byte_states(ids_BS), patch_of_byte(starts_BS), ids_BS != PADDING_ID)
        patches = torch.arange(patches_BPC.shape[1], device=ids_BS.device)
        return patches_BPC, patches < starts_BS.sum(1, keepdim=True)


class ByteLatentTransformer(nn.Module):
    """The language model: local encoder, global Llama over patches, local decoder.

    A byte is predicted from the bytes up to the one before it, and from the patches that were finished by then.

    Args:
        config: bytes and patches; its patcher is not used, the starts come with the ids.
        backbone: the global model's sizes; its mask is causal.
        num_decoder_layers: each looks at the patches, then at the bytes.
    """

    def __init__(self, config: schema.BltText, backbone: schema.DenseBackbone, num_decoder_layers: int):
        super().__init__()
        width, patch_width = config.byte_width, config.queries_per_patch * config.byte_width
        self.queries_per_patch = config.queries_per_patch
        self.byte_states, self.patch_encoder = ByteStates(config), PatchEncoder(config)
        matches = backbone.width == patch_width
        self.to_backbone = nn.Identity() if matches else nn.Linear(patch_width, backbone.width, bias=False)
        self.from_backbone = nn.Linear(backbone.width, patch_width, bias=False)
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        truncated_normal(self)
        self.backbone = ByteLayers(backbone)
        self.cross_attentions = nn.ModuleList(
            CrossAttention(width, config.num_byte_heads) for _ in range(num_decoder_layers)
        )
        self.decoder_layers = nn.ModuleList(ByteLayers(byte_backbone(config, 1)) for _ in range(num_decoder_layers))

    def forward(self, ids_BS: Tensor, starts_BS: Tensor, next_starts_B: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) of the next byte, of ids and starts as the patchers give them.

        Args:
            next_starts_B: bool, for texts without padding: whether the byte that is to come begins a patch, so that
                it may see the one before. None: it does not.
        """
        is_byte_BS = ids_BS != PADDING_ID
        patch_BS = patch_of_byte(starts_BS)
        states_BSC = self.byte_states(ids_BS)
        patches_BPD = self.to_backbone(self.patch_encoder(states_BSC, patch_BS, is_byte_BS))
        patches = torch.arange(patches_BPD.shape[1], device=ids_BS.device)
        is_patch_BP = patches < starts_BS.sum(1, keepdim=True)
        layout = Layout.of(torch.full_like(is_patch_BP, TEXT, dtype=torch.int64), is_token_BS=is_patch_BP)
        global_BPD = self.backbone(patches_BPD, layout)
        keys_BKC = self.from_backbone(global_BPD).unflatten(-1, (self.queries_per_patch, -1)).flatten(1, 2)
        # What predicts the first byte of a patch may look at the patch before it, which has just been finished.
        next_B = patch_BS[:, -1] if next_starts_B is None else patch_BS[:, -1] + next_starts_B
        finished_BS = (torch.cat([patch_BS[:, 1:], next_B[:, None]], dim=1) - 1).clamp(min=0)
        mask_BSK = (finished_BS[..., None] == patches).repeat_interleave(self.queries_per_patch, dim=-1)
        for cross_attention, layer in zip(self.cross_attentions, self.decoder_layers, strict=True):
            states_BSC = layer(cross_attention(states_BSC, keys_BKC, mask_BSK), byte_layout(ids_BS))
        return self.head(self.norm(states_BSC))
