"""Study `noisy_text`: which text encoder still understands an instruction whose letters are noisy?

Every model learns from clean instructions what is to be done with what, of which colour, and where (the slots of
lapa/studies/noisy_instructions.py), and is tested on combinations it has not met, clean and under six noises. The
encoder's tokens and a readout pass a small shared backbone. All arms but `bytes_wide` have the forward FLOPs of plain
bytes, the byte model that finds patches counted in: encoders that give fewer tokens get a wider backbone.

    bpe             byte pairs, merged as the training texts suggest
    words           one token a word in small letters: the encoder that policies have by default
    words_cased     the same, with capitals
    bytes           one token a byte
    bytes_ngrams    the same, with the hashed n-grams of BLT
    blt_static      patches of equal length
    blt_space       patches are words
    blt_entropy     patches begin where a small byte model is unsure
    blt_no_ngrams   blt_entropy without hashed n-grams
    blt_lower       blt_entropy, reading capitals as small letters
    bytes_wide      plain bytes with the parameters of blt_entropy
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lapa.backbones.base import LATENT_ACTION, NUM_MODALITIES, TEXT, Layout, build_backbone
from lapa.backbones.text import EncodedText, TextEncoder, WordEncoder, build_text_encoder, without_empty_columns
from lapa.runtime import Compute
from lapa.schema import BltText, ByteText, DenseBackbone, NoisyTextStudy, WordText
from lapa.schema import TextEncoder as TextEncoderConfig
from lapa.studies.noisy_instructions import NOISES, SLOTS, draw_instructions
from lapa.studies.study import Arm
from lapa.text import PADDING_ID, word_id
from lapa.trainer import finish, fit

COLUMNS = ["noisy", "clean", *NOISES, "mflops", "parameters", "tokens", "tokens_noisy", "train_cpu_s", "wall_time_s"]
NOTES = """
Share of slots that are right on held-out combinations, a tenth of the instructions in capitals; `noisy` is the mean
over the six noises. All arms have the same steps, batches and learning rate; what a table shows of robustness is at
that budget, and plain bytes learn slowest. mflops: of one clean instruction, forward, the byte model that finds
patches counted in; arms have those of `bytes` of the same seed, but bytes_wide, which has the parameters of
blt_entropy. Compare blt_entropy with blt_no_ngrams for what hashed n-grams cost under noise, and tokens with
tokens_noisy for patches that shrink where the byte model is surprised. words reads small letters only.
"""

# Long enough for capitals with spaces between, which no arm shall be cut off in.
MAX_BYTES = 144
MAX_WORDS = 80
WIDTH_STEP = 8
FLOP_TEXTS = 16

EncoderBuilder = Callable[[int], TextEncoder]


class CasedWordEncoder(WordEncoder):
    """Words as they are written."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        ids_BW = torch.full((len(texts), self.max_words), PADDING_ID, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids = [word_id(word) for word in re.findall(r"[^\W_]+", text)[: self.max_words]]
            ids_BW[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return ids_BW


class BytePairEncoder(TextEncoder):
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over bytes, so that nothing is unknown."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING_ID)
        self.position = nn.Parameter(torch.randn(MAX_BYTES, width) * 0.02)
        self.tokenizer: Any = None

    def fit(self, texts: Sequence[str], seed: int) -> None:
        try:
            from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        except ImportError:
            raise ImportError("the bpe arm needs tokenizers: pip install 'lerobot_policy_lapa[transformers]'") from None
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=self.embedding.num_embeddings,
            special_tokens=["<padding>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self.tokenizer.train_from_iterator(texts, trainer)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        ids_BW = torch.full((len(texts), MAX_BYTES), PADDING_ID, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids = self.tokenizer.encode(text).ids[:MAX_BYTES]
            ids_BW[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return ids_BW

    def forward(self, ids_BW: Tensor) -> EncodedText:
        ids_BT = without_empty_columns(ids_BW)
        tokens_BTD = self.embedding(ids_BT)
        return EncodedText(
            tokens_BTD=tokens_BTD + self.position[: ids_BT.shape[1]],
            is_token_BT=ids_BT != PADDING_ID,
            summary_BD=F.rms_norm(tokens_BTD.sum(1), (self.width,)),
        )


class SlotModel(nn.Module):
    """Instruction to logits of its slots, through the backbone that a policy would share with image and action."""

    def __init__(self, build_encoder: EncoderBuilder, study: NoisyTextStudy, width: int):
        super().__init__()
        self.text_encoder = build_encoder(width)
        self.readout = nn.Parameter(torch.randn(width))
        self.backbone = build_backbone(backbone_config(study, width))
        self.head = nn.Linear(width, sum(map(len, SLOTS.values())))

    def forward(self, ids_BW: Tensor) -> list[Tensor]:
        """Logits (B, values) of each slot."""
        text = self.text_encoder(ids_BW)
        tokens_BSD = torch.cat([text.tokens_BTD, self.readout.expand(len(ids_BW), 1, -1)], dim=1)
        is_token_BS = F.pad(text.is_token_BT, (0, 1), value=True)
        modality_ids_BS = torch.full_like(is_token_BS, TEXT, dtype=torch.int64)
        modality_ids_BS[:, -1] = LATENT_ACTION
        hidden_BSD = self.backbone(tokens_BSD, Layout.of(modality_ids_BS, is_token_BS=is_token_BS))
        return list(self.head(hidden_BSD[:, -1]).split([len(values) for values in SLOTS.values()], dim=-1))


def backbone_config(study: NoisyTextStudy, width: int) -> DenseBackbone:
    return DenseBackbone(width=width, num_layers=study.num_layers, num_heads=4, mask="bidirectional", rotary_theta=1e4)


def encoders(study: NoisyTextStudy) -> dict[str, EncoderBuilder]:
    """What makes the text encoder of each arm, of a width."""
    plain = ByteText(
        max_bytes=MAX_BYTES, byte_width=study.byte_width, ngram_table_size=study.ngram_table_size, num_byte_heads=2
    )
    blt = BltText(
        max_bytes=MAX_BYTES,
        byte_width=study.byte_width,
        ngram_table_size=study.ngram_table_size,
        num_byte_heads=2,
        mean_patch_bytes=study.mean_patch_bytes,
        entropy_steps=study.entropy_steps,
    )
    words = WordText(max_words=MAX_WORDS, num_layers=0)  # only its tokens are read
    configs: dict[str, TextEncoderConfig] = {
        "bytes": plain,
        "words": words,
        "bytes_ngrams": replace(plain, max_ngram=blt.max_ngram),
        "blt_static": replace(blt, patcher="static"),
        "blt_space": replace(blt, patcher="space"),
        "blt_entropy": blt,
        "blt_no_ngrams": replace(blt, max_ngram=0),
        "blt_lower": replace(blt, lower_case=True),
    }
    build: dict[str, EncoderBuilder] = {name: partial(build_text_encoder, config) for name, config in configs.items()}
    build["bytes_wide"] = build["bytes"]
    build["words_cased"] = partial(CasedWordEncoder, words)
    build["bpe"] = partial(BytePairEncoder, study.byte_pair_vocabulary)
    return build


def arms(study: NoisyTextStudy) -> list[Arm]:
    return [Arm(name, partial(run_arm, study, name)) for name in encoders(study)]


def run_arm(study: NoisyTextStudy, name: str, seed: int, folder: Path, compute: Compute) -> dict[str, float]:
    """Train one arm on clean instructions; accuracies, cost and sizes."""
    rng = np.random.default_rng(seed)
    texts, slots = draw_instructions(study.num_train, False, study.capitals_share, rng)
    test_texts, test_slots = draw_instructions(study.num_test, True, study.capitals_share, rng)
    build = encoders(study)
    if name == "bytes_wide":
        width = width_of_equal_parameters(study, build, texts, test_texts, seed)
    else:
        width = width_of_equal_flops(study, build, name, texts, test_texts, seed)
    torch.manual_seed(seed)
    model = SlotModel(build[name], study, width)
    model.text_encoder.fit(texts, seed)
    ids_NW, slots_NK = model.text_encoder.encode_text(texts).to(compute.device), torch.from_numpy(slots)
    slots_NK = slots_NK.to(compute.device)

    def loss(rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(ids_NW[rows])
        total = torch.stack([F.cross_entropy(x.float(), slots_NK[rows, k]) for k, x in enumerate(logits)]).sum()
        return total, {}

    started = time.process_time()
    fit(
        model,
        lambda generator: generator.integers(len(texts), size=study.training.batch_size),
        loss,
        replace(study.training, seed=seed),
        compute,
        folder,
        description=f"{name}, width {width}",
    )
    train_cpu_s = time.process_time() - started
    finish(folder)
    numbers = {"clean": accuracy(model, test_texts, test_slots, compute)}
    tokens_noisy = []
    for noise, spoil in NOISES.items():
        noisy_texts = [spoil(text, rng) for text in test_texts]
        numbers[noise] = accuracy(model, noisy_texts, test_slots, compute)
        tokens_noisy.append(num_tokens(model.text_encoder, noisy_texts))
    return {
        "noisy": float(np.mean([numbers[noise] for noise in NOISES])),
        **numbers,
        "mflops": flops_of(model, test_texts[:FLOP_TEXTS]) / 1e6,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": num_tokens(model.text_encoder, test_texts),
        "tokens_noisy": float(np.mean(tokens_noisy)),
        "train_cpu_s": train_cpu_s,
        "width": width,
    }


@torch.no_grad()
def accuracy(model: SlotModel, texts: list[str], slots: np.ndarray, compute: Compute) -> float:
    """Share of slots that are right."""
    hits = []
    for start in range(0, len(texts), 128):
        ids_BW = model.text_encoder.encode_text(texts[start : start + 128]).to(compute.device)
        with compute.autocast():
            found_BK = torch.stack([x.argmax(-1) for x in model(ids_BW)], dim=1).cpu()
        hits.append(found_BK == torch.from_numpy(slots[start : start + 128]))
    return float(torch.cat(hits).float().mean())


@torch.no_grad()
def num_tokens(encoder: TextEncoder, texts: list[str]) -> float:
    """Tokens of an instruction in the backbone, on average."""
    device = next(encoder.parameters()).device
    parts = [encoder.encode_text(texts[start : start + 128]).to(device) for start in range(0, len(texts), 128)]
    return float(sum(encoder(ids_BW).is_token_BT.sum() for ids_BW in parts)) / len(texts)


@torch.no_grad()
def flops_of(model: SlotModel | TextEncoder, texts: list[str]) -> float:
    """Forward floating-point operations of one instruction from letters on, on average, as a profiler counts them."""
    encoder = model.text_encoder if isinstance(model, SlotModel) else model
    device = next(model.parameters()).device
    # The fused attention of the CPU is not in the profiler's list; its plain form is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for text in texts:
            model(encoder.encode_text([text]).to(device))
    return counter.get_total_flops() / len(texts)


def width_of_equal_flops(
    study: NoisyTextStudy,
    build: dict[str, EncoderBuilder],
    name: str,
    texts: list[str],
    test_texts: list[str],
    seed: int,
) -> int:
    """The backbone's width with which an arm costs as much as plain bytes of width `study.width`."""
    if name == "bytes":
        return study.width
    examples = test_texts[:FLOP_TEXTS]

    def cost_by_width(encoder: TextEncoder) -> Callable[[int], float]:
        # The encoder's own cost hardly follows the width: only its last projection does.
        own, lengths = flops_of(encoder, examples), [0] * NUM_MODALITIES
        lengths[TEXT] = round(num_tokens(encoder, examples)) + 1
        return lambda width: own + backbone_flops(study, width, lengths)

    budget = cost_by_width(build["bytes"](study.width))(study.width)
    encoder = build[name](study.width)
    encoder.fit(texts, seed)
    cost = cost_by_width(encoder)
    widths = range(2 * WIDTH_STEP, 8 * study.width, WIDTH_STEP)
    return min(widths, key=lambda width: abs(np.log(cost(width) / budget)))


def backbone_flops(study: NoisyTextStudy, width: int, modality_lengths: list[int]) -> int:
    with torch.device("meta"):
        return build_backbone(backbone_config(study, width)).forward_flops(modality_lengths)


def width_of_equal_parameters(
    study: NoisyTextStudy, build: dict[str, EncoderBuilder], texts: list[str], test_texts: list[str], seed: int
) -> int:
    """The backbone's width with which plain bytes have as many parameters as `blt_entropy`."""
    blt_width = width_of_equal_flops(study, build, "blt_entropy", texts, test_texts, seed)
    wanted = num_parameters(build["blt_entropy"], study, blt_width)
    widths = range(study.width, 8 * study.width, WIDTH_STEP)
    return min(widths, key=lambda width: abs(np.log(num_parameters(build["bytes"], study, width) / wanted)))


def num_parameters(build_encoder: EncoderBuilder, study: NoisyTextStudy, width: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SlotModel(build_encoder, study, width).parameters())


def draw(results: dict[str, dict], path: Path) -> None:
    """Every arm under every noise: the share of slots that are right, mean over seeds."""
    from matplotlib.figure import Figure

    kinds = ["clean", *NOISES]
    share_AK = np.array([[values[kind]["mean"] for kind in kinds] for values in results.values()])
    figure = Figure(figsize=(8, 0.45 * len(results) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share_AK, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    axes.set_yticks(range(len(results)), list(results))
    axes.set_title("share of slots that are right")
    for row, shares in enumerate(share_AK):
        for column, share in enumerate(shares):
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color="black" if share > 0.6 else "white")
    figure.savefig(path, dpi=130)
