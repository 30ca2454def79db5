"""A small byte language model, whose uncertainty says where patches begin (arXiv 2412.09871, section 2.3).

It is trained on the texts of the data set, in seconds, before the rest; then it is frozen.

Shapes: B batch, S bytes, V vocabulary of bytes, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.backbones.base import TEXT, Layout
from lapa.backbones.dense import DenseTransformer
from lapa.backbones.patchers import VOCABULARY
from lapa.schema import DenseBackbone
from lapa.text import PADDING_ID

ROTARY_THETA = 1e4  # of the released byte model; the layers over bytes and patches have another
ROWS_AT_ONCE = 256  # logits are V times as large as their texts
TRAINING_BATCH = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20


def byte_layout(ids_BS: Tensor) -> Layout:
    """Text, with padding that nobody sees."""
    return Layout.of(torch.full_like(ids_BS, TEXT), is_token_BS=ids_BS != PADDING_ID)


class ByteModel(nn.Module):
    """A causal Llama over bytes. What it says of a text does not depend on the other rows of the batch."""

    def __init__(self, width: int, num_layers: int, num_heads: int, feed_forward_ratio: float = 2.67):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.transformer = DenseTransformer(
            DenseBackbone(
                width=width,
                num_layers=num_layers,
                num_heads=num_heads,
                mask="causal",
                feed_forward_ratio=feed_forward_ratio,
                query_key_norm=False,
                rotary_theta=ROTARY_THETA,
            )
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.head.weight, std=width**-0.5)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of the next byte."""
        return self.head(self.transformer(self.embedding(ids_BS), byte_layout(ids_BS)))

    @torch.no_grad()
    def entropies(self, ids_BS: Tensor) -> Tensor:
        """(B, S) in nats, of the guess at the byte that follows each; float32 whatever the autocast type."""
        device = self.head.weight.device
        parts = []
        with torch.autocast(device.type, enabled=False):
            for rows_BS in ids_BS.to(device).split(ROWS_AT_ONCE):
                log_p_BSV = self(rows_BS).log_softmax(-1)
                parts.append(-(log_p_BSV.exp() * log_p_BSV).sum(-1).to(ids_BS.device))
        return torch.cat(parts)


def train_byte_model(model: ByteModel, ids_BS: Tensor, num_steps: int, seed: int) -> float:
    """Teach the model these texts and freeze it; the mean of the last losses, in nats a byte, is returned.

    The result depends on the texts, the steps, the seed and the model's weights alone.
    """
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, max(0.05, 1 - step / max(1, num_steps)))
    )
    generator = np.random.default_rng(seed)
    losses = []
    for _ in range(num_steps):
        rows_BS = ids_BS[torch.from_numpy(generator.integers(len(ids_BS), size=TRAINING_BATCH))]
        rows_BS = rows_BS[:, : int((rows_BS != PADDING_ID).sum(1).max())].to(model.head.weight.device)
        logits_BSV = model(rows_BS[:, :-1])
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), rows_BS[:, 1:].flatten(), ignore_index=PADDING_ID)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.requires_grad_(False).eval()
    model.zero_grad(set_to_none=True)
    return float(np.mean(losses[-20:])) if losses else float("nan")
