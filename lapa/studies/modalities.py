"""Study `modalities`: does a modality learn faster with weights of its own (mixture-of-transformers, arXiv 2411.04996)?

One sequence tells what happens in an episode, and every token of it is predicted from those before:

    text first   begin, words, end, image, actions, image
    text last    begin, image, actions, image, words, end

The episodes are simulated (`lapa demos`). An image is a grid of patches, each the nearest of some codes that k-means
finds on training episodes; an action is a token a dimension, its bin among quantiles; words are those of the training
episodes. Half of the sequences, drawn at random, have the text last: then it is predicted from what was done.

Held-out loss is measured by modality on other episodes, every few steps. The learning rate stays constant after its
warm-up, so that what an arm reaches at a step does not depend on how many are still to come.

Shapes: E episodes, N frames, P patches of an image, A action dimensions, W words at most, B batch, S sequence,
V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.backbones.base import IMAGE, NUM_MODALITIES, ROBOT_ACTION, TEXT, Layout, build_backbone
from lapa.clusters import kmeans
from lapa.data import FrameStore, open_frames, split_episodes, to_float
from lapa.runtime import Compute
from lapa.schema import DenseBackbone, ModalitiesStudy, MoTBackbone
from lapa.studies.study import Arm, steps_to_reach
from lapa.trainer import finish, fit, read_log

PADDING, TEXT_FIRST, TEXT_LAST, END, UNKNOWN = range(5)
FIRST_WORD = 5
PATCH_SAMPLE = 20_000  # patches that the codes are found on
PATCH_DETAIL = 4  # pixels along a side that a patch is averaged to before it is compared with the codes
EVALUATION_BATCH = 64
MODALITIES = {"text": TEXT, "image": IMAGE, "action": ROBOT_ACTION}

COLUMNS = [
    "nats",
    *(f"{name}_nats" for name in MODALITIES),
    *(f"{name}_steps_to_match" for name in MODALITIES),
    "forward_megaflops",
    "parameters",
    "train_cpu_s",
]
NOTES = """
nats: held-out loss a token after the last step, over all tokens and by modality. steps_to_match: the share of the
steps after which an arm's held-out loss is at most the last one of dense with the same seed; nan where some seed never
gets there. mot has experts for text, image and action, untied in all parts; mot_feed_forward unties the feed-forward
alone; mot_merge_a_b has one expert for a and b together. All of them have the forward FLOPs of dense (of a sequence, in
millions); dense_wide has about the parameters of mot, at more FLOPs.
"""


@dataclass(frozen=True)
class Corpus:
    """Episodes as tokens of one vocabulary.

    text_first_EW: begin, words and end of every episode, padded on the left. text_last_EW: words and end, padded on the
    right. image_NP and action_NA: tokens of every frame. starts: frames that a sequence can begin at, (training,
    held out). modality_V: what each token of the vocabulary is.
    """

    text_first_EW: np.ndarray
    text_last_EW: np.ndarray
    image_NP: np.ndarray
    action_NA: np.ndarray
    episode_N: np.ndarray
    starts: tuple[np.ndarray, np.ndarray]
    modality_V: Tensor
    num_images: int
    frame_gap: int

    def sequences(self, starts_B: np.ndarray, text_first_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, S) and their slots (B, S), which know a token's place within its modality; 0 is padding."""
        images, gap = [], self.frame_gap
        for index in range(self.num_images):
            images.append(self.image_NP[starts_B + index * gap])
            if index < self.num_images - 1:
                steps_BG = starts_B[:, None] + index * gap + np.arange(gap)
                images.append(self.action_NA[steps_BG].reshape(len(starts_B), -1))
        seen_BS = np.concatenate(images, axis=1)
        episodes_B = self.episode_N[starts_B]
        first_BS = np.concatenate([self.text_first_EW[episodes_B], seen_BS], axis=1)
        begin_B1 = np.full((len(starts_B), 1), TEXT_LAST)
        last_BS = np.concatenate([begin_B1, seen_BS, self.text_last_EW[episodes_B]], axis=1)
        num_text = self.text_first_EW.shape[1]
        text_slots_W = np.arange(num_text)
        seen_slots_BS = np.broadcast_to(num_text + np.arange(seen_BS.shape[1]), seen_BS.shape)
        num_padding_B1 = (self.text_first_EW[episodes_B] == PADDING).sum(1, keepdims=True)
        first_slots_BS = np.concatenate([(text_slots_W - num_padding_B1).clip(min=0), seen_slots_BS], axis=1)
        last_slots_S = np.r_[0, seen_slots_BS[0], text_slots_W[1:]]
        is_first_B1 = text_first_B[:, None]
        tokens_BS = torch.from_numpy(np.where(is_first_B1, first_BS, last_BS))
        return tokens_BS, torch.from_numpy(np.where(is_first_B1, first_slots_BS, last_slots_S))

    @property
    def modality_lengths(self) -> list[int]:
        """Tokens of each modality in a sequence, padding among the text."""
        images = self.num_images * self.image_NP.shape[1]
        actions = (self.num_images - 1) * self.frame_gap * self.action_NA.shape[1]
        lengths = [0] * NUM_MODALITIES
        lengths[TEXT], lengths[IMAGE], lengths[ROBOT_ACTION] = self.text_first_EW.shape[1], images, actions
        return lengths


def read_corpus(study: ModalitiesStudy) -> Corpus:
    """Tokens of all episodes of the study's data; ValueError where it has no actions or no episode is long enough."""
    if study.image_size % study.patch_size or study.patch_size % PATCH_DETAIL:
        raise ValueError(
            f"study.patch_size is {study.patch_size}, expected a multiple of {PATCH_DETAIL} that divides "
            f"image_size {study.image_size}"
        )
    store = open_frames(study.data, study.image_size)
    if store.actions is None:
        raise ValueError(f"{study.data} has no actions: use demos/ of `lapa demos`")
    training, held_out = split_episodes(store, study.holdout_fraction, seed=0)
    episode_N = store.episode_of_frame()
    num_steps = (study.num_images - 1) * study.frame_gap
    is_start_N = store.steps_left() >= num_steps
    starts = tuple(np.flatnonzero(is_start_N & np.isin(episode_N, part)) for part in (training, held_out))
    if not all(map(len, starts)):
        raise ValueError(
            f"{study.data} has no episode of {num_steps + 1} frames to train on or to hold out: lower study.frame_gap"
        )
    in_training_N = np.isin(episode_N, training)
    text_first_EW, text_last_EW, num_words = text_tokens(store.instructions, training)
    first_image = FIRST_WORD + num_words
    first_action = first_image + study.num_image_codes
    action_NA = action_bins(store.actions, in_training_N, study.num_action_bins)
    num_actions = study.num_action_bins * store.actions.shape[1]
    modality_V = torch.full((first_action + num_actions,), TEXT)
    modality_V[first_image:first_action] = IMAGE
    modality_V[first_action:] = ROBOT_ACTION
    return Corpus(
        text_first_EW=text_first_EW,
        text_last_EW=text_last_EW,
        image_NP=first_image + image_codes(store, in_training_N, study),
        action_NA=first_action + action_NA + study.num_action_bins * np.arange(store.actions.shape[1]),
        episode_N=episode_N,
        starts=(starts[0], starts[1]),
        modality_V=modality_V,
        num_images=study.num_images,
        frame_gap=study.frame_gap,
    )


def text_tokens(instructions: list[str], training: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Instructions padded on the left and with a begin token, padded on the right and without, and number of words."""
    words = sorted({word for episode in training for word in instructions[episode].lower().split()})
    ids = {word: FIRST_WORD + index for index, word in enumerate(words)}
    texts = [[ids.get(word, UNKNOWN) for word in text.lower().split()] + [END] for text in instructions]
    longest = max(map(len, texts))
    first = [[PADDING] * (longest - len(text)) + [TEXT_FIRST, *text] for text in texts]
    last = [text + [PADDING] * (longest - len(text)) for text in texts]
    return np.array(first), np.array(last), len(words)


def action_bins(actions_NA: np.ndarray, in_training_N: np.ndarray, num_bins: int) -> np.ndarray:
    """(N, A) bin in [0, num_bins) of every action, between quantiles of the training episodes."""
    levels = np.linspace(0, 1, num_bins + 1)[1:-1]
    edges = np.quantile(actions_NA[in_training_N], levels, axis=0)
    return np.stack(
        [np.searchsorted(edges[:, a], actions_NA[:, a], side="right") for a in range(actions_NA.shape[1])], 1
    )


def image_codes(store: FrameStore, in_training_N: np.ndarray, study: ModalitiesStudy) -> np.ndarray:
    """(N, P) nearest code of every patch; the codes are the means of patches of training episodes (k-means)."""
    num_frames = PATCH_SAMPLE * study.patch_size**2 // study.image_size**2
    frames = np.random.default_rng(0).permutation(np.flatnonzero(in_training_N))[:num_frames]
    sample = patches(store.frames[np.sort(frames)], study.patch_size)
    codes_KC = kmeans(sample.flatten(0, 1), study.num_image_codes, torch.Generator().manual_seed(0))
    parts = [
        torch.cdist(patches(store.frames[part], study.patch_size), codes_KC).argmin(-1)
        for part in np.array_split(np.arange(store.num_frames), 1 + store.num_frames // 256)
    ]
    return torch.cat(parts).numpy()


def patches(frames_NHWC: np.ndarray, patch_size: int) -> Tensor:
    """Patches (N, P, C) in rows, averaged to a few pixels, in [0, 1]."""
    small_NCHW = F.avg_pool2d(to_float(frames_NHWC), patch_size // PATCH_DETAIL)
    return F.unfold(small_NCHW, PATCH_DETAIL, stride=PATCH_DETAIL).transpose(1, 2)


class SequenceModel(nn.Module):
    """Token and slot embeddings, a causal backbone, and logits over the whole vocabulary."""

    modality_V: Tensor

    def __init__(self, config: DenseBackbone, corpus: Corpus):
        super().__init__()
        vocabulary = len(corpus.modality_V)
        self.register_buffer("modality_V", corpus.modality_V, persistent=False)
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.slot = nn.Embedding(sum(corpus.modality_lengths), config.width)
        self.backbone = build_backbone(config)
        self.head = nn.Linear(config.width, vocabulary, bias=False)

    def token_nats(self, tokens_BS: Tensor, slots_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (B, S - 1) of every token but the first, 0 for padding, and what each is: its modality, or -1."""
        inputs_BS, targets_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
        layout = Layout.of(self.modality_V[inputs_BS], is_token_BS=inputs_BS != PADDING)
        hidden_BSD = self.backbone(self.embedding(inputs_BS) + self.slot(slots_BS[:, :-1]), layout)
        # What follows padding is the token that begins the sequence.
        is_target_BS = (targets_BS != PADDING) & (inputs_BS != PADDING)
        nats_BS = F.cross_entropy(self.head(hidden_BSD).float().transpose(1, 2), targets_BS, reduction="none")
        return nats_BS * is_target_BS, self.modality_V[targets_BS].masked_fill(~is_target_BS, -1)


def mean_nats(nats_BS: Tensor, modality_BS: Tensor) -> dict[str, Tensor]:
    """Over all tokens, and by modality; nan where there are no tokens of it."""
    chosen = {"nats": modality_BS >= 0} | {f"{name}_nats": modality_BS == m for name, m in MODALITIES.items()}
    return {name: (nats_BS * chosen_BS).sum() / chosen_BS.sum() for name, chosen_BS in chosen.items()}


def backbones(study: ModalitiesStudy) -> dict[str, DenseBackbone]:
    """Every arm's backbone; the wide one has about the parameters of full mixture-of-transformers."""
    dense = DenseBackbone(width=study.width, num_layers=study.num_layers, num_heads=study.num_heads, mask="causal")
    shared = {field.name: getattr(dense, field.name) for field in fields(dense) if field.name != "name"}
    mot = MoTBackbone(**shared)
    widths = range(study.width, 4 * study.width, 2 * study.num_heads)
    with torch.device("meta"):
        goal = build_backbone(mot).num_parameters()
        wide = min(widths, key=lambda width: abs(build_backbone(replace(dense, width=width)).num_parameters() - goal))
    actions = mot.merged[0]
    return {
        "dense": dense,
        "dense_wide": replace(dense, width=wide),
        "mot_feed_forward": replace(mot, untie=["feed_forward"]),
        "mot": mot,
        "mot_merge_image_action": replace(mot, merged=[["image", *actions]]),
        "mot_merge_text_action": replace(mot, merged=[["text", *actions]]),
        "mot_merge_text_image": replace(mot, merged=[["text", "image"], actions]),
    }


def arms(study: ModalitiesStudy) -> list[Arm]:
    """The dense control first: the others are compared with it, and it sets the losses to match."""
    corpus = cache(lambda: read_corpus(study))
    return [Arm(name, partial(run_arm, study, config, corpus)) for name, config in backbones(study).items()]


def run_arm(
    study: ModalitiesStudy,
    config: DenseBackbone,
    read: Callable[[], Corpus],
    seed: int,
    folder: Path,
    compute: Compute,
) -> dict[str, float]:
    """Train one model; its held-out loss, and when it was as good as dense."""
    corpus = read()
    torch.manual_seed(seed)
    model = SequenceModel(config, corpus)
    training_starts, held_out_starts = corpus.starts
    # The same sequences for every arm and seed.
    rng = np.random.default_rng(0)
    held_out_starts = rng.permutation(held_out_starts)[: study.num_held_out]
    held_out = corpus.sequences(held_out_starts, rng.random(len(held_out_starts)) < 0.5)

    def make_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        starts_B = rng.choice(training_starts, study.training.batch_size)
        return corpus.sequences(starts_B, rng.random(len(starts_B)) < 0.5)

    def loss_function(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = mean_nats(*model.token_nats(*(part.to(compute.device) for part in batch)))
        return numbers["nats"], {name: value.detach() for name, value in numbers.items()}

    def evaluate() -> dict[str, float]:
        return held_out_nats(model, held_out, compute)

    started = time.process_time()
    training = replace(study.training, seed=seed)
    every = training.log_every_steps
    fit(model, make_batch, loss_function, training, compute, folder, folder.name, evaluate, every)
    numbers = {"train_cpu_s": time.process_time() - started}
    finish(folder)
    numbers |= evaluate_log(folder, training.num_steps)
    numbers["forward_megaflops"] = model.backbone.forward_flops(corpus.modality_lengths) / 1e6
    numbers["parameters"] = model.backbone.num_parameters()
    return numbers


@torch.no_grad()
def held_out_nats(model: SequenceModel, held_out: tuple[Tensor, Tensor], compute: Compute) -> dict[str, float]:
    """Means over the tokens of all held-out sequences."""
    found = []
    for tokens_BS, slots_BS in zip(*(part.split(EVALUATION_BATCH) for part in held_out), strict=True):
        with compute.autocast():
            found.append(model.token_nats(tokens_BS.to(compute.device), slots_BS.to(compute.device)))
    nats_BS, modality_BS = (torch.cat(parts) for parts in zip(*found, strict=True))
    return {f"held_out_{name}": float(value) for name, value in mean_nats(nats_BS, modality_BS).items()}


def evaluate_log(folder: Path, num_steps: int) -> dict[str, float]:
    """The last held-out losses of a run, and the shares of the steps after which they were at most dense's last."""
    *_, last = read_log(folder / "log.jsonl")
    numbers = {name.removeprefix("held_out_"): value for name, value in last.items() if name.startswith("held_out_")}
    dense = list(read_log(folder.with_name(f"dense-{folder.name.rsplit('-', 1)[1]}") / "log.jsonl"))
    for name in MODALITIES if dense else []:
        level = f"held_out_{name}_nats"
        numbers[f"{name}_steps_to_match"] = steps_to_reach(folder, level, dense[-1][level]) / num_steps
    return numbers


def draw(results: dict[str, dict], path: Path) -> None:
    """Held-out loss against steps, a panel a modality, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(MODALITIES)), MODALITIES, strict=True):
        for arm in results:
            logs = [list(read_log(folder / "log.jsonl")) for folder in (path.parent / "runs").glob(f"{arm}-seed*/")]
            curves = np.array([[row[f"held_out_{name}_nats"] for row in log] for log in logs])
            axes.plot([row["step"] for row in logs[0]], curves.mean(0), label=arm)
        axes.set(title=name, xlabel="step", ylabel="held-out nats a token", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
