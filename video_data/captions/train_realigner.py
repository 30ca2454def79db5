"""Stage `lapa train_realigner`: true captions, made noisy on purpose, teach a captioner to edit titles; measured.

Clips with true captions are split. One part trains an image encoder to tell the slots of the captions; it is frozen
and shared by all that follows. From the captions of that part noisy titles are made anew at every step (`titles.py`),
and three arms learn to write the truth from them: *scratch* never sees a title, *copying* never sees a frame,
*realigned* sees both, the title replaced by nothing half of the time (as in Altogether, arXiv 2410.17251). The other
part is measured, and written as frame stores with its raw titles, its realigned and its true captions.

output_dir/
    encoder.safetensors
    seed<n>/<arm>/   config.json, model.safetensors: what captioner.name=realigner loads
    results.json     every metric and arm with its interval, and the paired differences
    table.md         the same to read
    captions.csv     title, truth and what the first seed's arms wrote, a row a held-out clip
    stores/          raw_titles, realigned, true: frame stores of the held-out clips, which differ in captions alone
"""

import csv
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from video_data.captions import slot_metrics
from video_data.captions.realigner import (
    PAD,
    ImageEncoder,
    Realigner,
    RealignerOptions,
    Vocabulary,
    caption_tokens,
    load_realigner,
    rewrite,
    shown_to_model,
    title_tokens,
    to_float,
)
from video_data.captions.titles import KINDS, SLOTS, TRAINING_KINDS, Lexicon, Title, make_title, parse
from video_data.store import write_text

MIN_COUNT = 5  # uses in captions and titles that make a word one of the vocabulary; a name is used less often
MAX_SHIFT = 2  # pixels by which the encoder's frames are moved in training
ENCODED_AT_ONCE = 256
# Streams of random numbers beside those of the training steps, which are (seed, arm, step).
SPLIT_STREAM, TITLE_STREAM, WORD_STREAM = 1, 2, 3


ARMS = ("scratch", "copying", "realigned")


@dataclass(frozen=True)
class Clips:
    """What of a frame store is looked at: frames (E, F, H, W, 3) uint8 and true captions of its clips."""

    frames: np.ndarray
    captions: list[str]


@dataclass(frozen=True)
class Examples:
    """What the arms learn from: true captions and visual tokens (E, V, K) of the training clips."""

    captions: list[str]
    visual_EVK: Tensor
    lexicon: Lexicon
    vocabulary: Vocabulary


def run(cfg) -> dict:
    """Train every arm of every seed, measure them, write the stores. cfg: lapa.schema.TrainRealignerConfig.

    Returns slot_f1, brand_recall, swaps_fixed, right_broken and exact of every arm, averaged over seeds. Goes on
    where a killed run stopped. Raises ValueError for data without captions of coloured objects, or too few clips.
    """
    _check(cfg)
    data, output = Path(cfg.data).expanduser(), Path(cfg.output_dir).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    clips = read_clips(data, cfg.realigner.num_frames)
    order = np.random.default_rng([cfg.holdout_seed, SPLIT_STREAM]).permutation(len(clips.captions))
    order = order[[bool(clips.captions[i].strip()) for i in order]]
    if len(order) < cfg.num_training_clips + len(KINDS):
        raise ValueError(
            f"{data} has {len(order)} clips with captions: more than num_training_clips={cfg.num_training_clips} are "
            "needed, because the realigner is measured on the others"
        )
    trained, held_out = np.sort(order[: cfg.num_training_clips]), np.sort(order[cfg.num_training_clips :])
    true_captions = [clips.captions[i] for i in trained]
    lexicon = Lexicon.of(true_captions)
    vocabulary = _vocabulary(true_captions, lexicon, cfg.holdout_seed)
    titles = held_out_titles([clips.captions[i] for i in held_out], lexicon, cfg.holdout_seed)
    encoder = _encoder(output, clips, trained, lexicon, cfg)
    visual_EVK = encode(encoder, clips.frames)
    examples = Examples(true_captions, visual_EVK[trained], lexicon, vocabulary)
    written: dict[str, list[list[str]]] = {"raw": [[title.text for title in titles]]}
    for seed in cfg.seeds:
        for arm in ARMS:
            folder = output / f"seed{seed}" / arm
            if not (folder / "config.json").is_file():
                _train(folder, arm, seed, encoder, clips.frames.shape[2], examples, cfg)
            for name, texts in _write(folder, arm, visual_EVK[held_out], titles, cfg).items():
                written.setdefault(name, []).append(texts)
    results = slot_metrics.measure(written, titles, lexicon.objects)
    write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(output / "table.md", slot_metrics.table(results))
    _write_captions(output / "captions.csv", titles, written)
    if not (output / "stores").is_dir():
        truths = [title.truth for title in titles]
        captions = {"raw_titles": written["raw"][0], "realigned": written["realigned"][0], "true": truths}
        write_stores(data, held_out, captions, output / "stores")
    return {
        f"{name}_{arm}": values["mean"]
        for name in slot_metrics.HEADLINE
        for arm, values in results["metrics"][name].items()
        if values is not None
    }


def _check(cfg) -> None:
    for name in ("num_training_clips", "encoder_steps", "num_steps", "batch_size", "num_rounds"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} is {getattr(cfg, name)}, expected at least 1")
    if not cfg.seeds:
        raise ValueError("seeds is empty, expected at least one, such as seeds=[0]")
    if not 0 <= cfg.empty_title_share < 1:
        raise ValueError(f"empty_title_share is {cfg.empty_title_share}, expected 0 or more and less than 1")


def read_clips(folder: Path, num_frames: int) -> Clips:
    """The clips of a frame store, `num_frames` of each; ValueError where `folder` is none."""
    if not (folder / "store.json").is_file():
        raise ValueError(f"no store.json in {folder}: data must be a frame store of `lapa ingest`")
    store = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    offsets = load_arrays(folder / "index.safetensors")["episode_offsets"]
    size = store["image_size"]
    frames = np.memmap(folder / "frames.u8", np.uint8, "r", shape=(store["num_frames"], size, size, 3))
    spans = itertools.pairwise(offsets)
    shown = np.stack([shown_to_model(frames[first:behind], num_frames, size) for first, behind in spans])
    return Clips(shown, store["instructions"])


def held_out_titles(captions: list[str], lexicon: Lexicon, seed: int) -> list[Title]:
    """A title a clip, as many of each kind; the same for every arm and seed of training."""
    rng = np.random.default_rng([seed, TITLE_STREAM])
    kinds = rng.permutation([KINDS[i % len(KINDS)] for i in range(len(captions))])
    made = zip(captions, kinds, strict=True)
    return [make_title(caption, kind, lexicon, rng, held_out=True) for caption, kind in made]


def _vocabulary(captions: list[str], lexicon: Lexicon, seed: int) -> Vocabulary:
    rng = np.random.default_rng([seed, WORD_STREAM])
    titles = [make_title(caption, kind, lexicon, rng).text for caption in captions for kind in TRAINING_KINDS]
    return Vocabulary.of([*captions, *titles], MIN_COUNT * len(TRAINING_KINDS))


def _device(name: str) -> torch.device:
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def _encoder(output: Path, clips: Clips, trained: np.ndarray, lexicon: Lexicon, cfg) -> ImageEncoder:
    """The image encoder in `output`, trained now where there is none."""
    device, options = _device(cfg.device), cfg.realigner
    torch.manual_seed(cfg.holdout_seed)
    encoder = ImageEncoder(options.num_frames, options.encoder_width, options.num_visual_tokens).to(device)
    path = output / "encoder.safetensors"
    if not path.is_file():
        slots = [parse(clips.captions[i], lexicon.objects).slots for i in trained]
        values = {slot: sorted({found.get(slot, "") for found in slots}) for slot in SLOTS}
        classes_EX = torch.tensor([[known.index(found.get(s, "")) for s, known in values.items()] for found in slots])
        sizes = [len(known) for known in values.values()]
        teller = nn.Sequential(
            encoder, nn.Flatten(), nn.Linear(options.num_visual_tokens * encoder.output_width, sum(sizes))
        ).to(device)

        def batch_loss(rng: np.random.Generator) -> Tensor:
            picked = rng.integers(len(trained), size=cfg.batch_size)
            logits = teller(to_float(_shifted(clips.frames[trained[picked]], rng)).to(device)).split(sizes, dim=1)
            classes_BX = classes_EX[picked].to(device)
            return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, classes_BX.T, strict=True)]).sum()

        checkpoint = output / "encoder_checkpoint.safetensors"
        fit(teller, batch_loss, cfg.encoder_steps, cfg.holdout_seed, checkpoint, "image encoder", cfg)
        _write_tensors(path, encoder.state_dict())
        checkpoint.unlink(missing_ok=True)
    encoder.load_state_dict(load_file(path))
    return encoder.eval().requires_grad_(False)


def _train(folder: Path, arm: str, seed: int, encoder: ImageEncoder, image_size: int, examples: Examples, cfg) -> None:
    """Train one arm on the frozen encoder's visual tokens and write its folder."""
    device, vocabulary = _device(cfg.device), examples.vocabulary
    options = RealignerOptions(image_size=image_size, **asdict(cfg.realigner))
    torch.manual_seed(seed)
    model = Realigner(options, len(vocabulary), sees_frames=arm != "copying").to(device)
    model.encoder.load_state_dict(encoder.state_dict())
    model.encoder.requires_grad_(False)
    empty_share = 1.0 if arm == "scratch" else cfg.empty_title_share

    def batch_loss(rng: np.random.Generator) -> Tensor:
        picked = rng.integers(len(examples.captions), size=cfg.batch_size)
        kinds = rng.choice(TRAINING_KINDS, size=len(picked))
        made = zip(picked, kinds, strict=True)
        titles = [make_title(examples.captions[i], kind, examples.lexicon, rng) for i, kind in made]
        is_empty = rng.random(len(titles)) < empty_share
        seen = ["" if empty else title.text for title, empty in zip(titles, is_empty, strict=True)]
        titles_BT, names = title_tokens(seen, vocabulary, options.max_title_words)
        truths = [title.truth for title in titles]
        truth_BC = torch.from_numpy(caption_tokens(truths, names, vocabulary, options.max_caption_words)).to(device)
        visual_BVK = examples.visual_EVK[torch.from_numpy(picked)]
        logits_BCN = model(visual_BVK, torch.from_numpy(titles_BT).to(device), truth_BC[:, :-1])
        return F.cross_entropy(logits_BCN.flatten(0, 1), truth_BC[:, 1:].flatten(), ignore_index=PAD)

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    fit(model, batch_loss, cfg.num_steps, seed, checkpoint, f"seed {seed}: {arm}", cfg)
    _write_tensors(folder / "model.safetensors", model.state_dict())
    config = {"realigner": asdict(options), "words": vocabulary.words, "sees_frames": model.sees_frames}
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)


def fit(
    model: nn.Module,
    batch_loss: Callable[[np.random.Generator], Tensor],
    num_steps: int,
    seed: int,
    checkpoint: Path,
    description: str,
    cfg,
) -> None:
    """AdamW with a warm-up and cosine decay. A batch is a function of (seed, step), so a killed run ends the same."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    first_step = _resume(checkpoint, model, optimizer)
    model.train()
    with tqdm(total=num_steps, initial=first_step, desc=description, unit="step", mininterval=1.0) as progress:
        for step in range(first_step, num_steps):
            warm_up = min(1.0, (step + 1) / cfg.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = cfg.learning_rate * warm_up * 0.5 * (1 + np.cos(np.pi * step / num_steps))
            loss = batch_loss(np.random.default_rng([seed, 0, step]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            progress.update()
            if (step + 1) % cfg.checkpoint_every_steps == 0:
                _save(checkpoint, model, optimizer, step + 1)
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def _save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
    _write_tensors(checkpoint, state | {"step": torch.tensor(step)})


def _resume(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load what `_save` wrote; the step to go on from."""
    if not checkpoint.is_file():
        return 0
    state = load_file(checkpoint)
    model.load_state_dict({name[6:]: tensor for name, tensor in state.items() if name.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            _, number, moment = name.split(".")
            moments.setdefault(int(number), {})[moment] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return int(state["step"])


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _shifted(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames (B, F, H, W, 3), each clip moved by a few pixels; what leaves at one side is cut off, and the border
    goes on at the other."""
    down, right = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, size=(2, len(frames)))
    rows = np.clip(np.arange(frames.shape[2]) + down[:, None], 0, frames.shape[2] - 1)
    columns = np.clip(np.arange(frames.shape[3]) + right[:, None], 0, frames.shape[3] - 1)
    clips = np.arange(len(frames))[:, None, None]
    return frames.transpose(0, 2, 3, 1, 4)[clips, rows[:, :, None], columns[:, None, :]].transpose(0, 3, 1, 2, 4)


@torch.no_grad()
def encode(encoder: ImageEncoder, frames: np.ndarray) -> Tensor:
    """Visual tokens (E, V, K) of frames (E, F, H, W, 3) uint8."""
    device = next(encoder.parameters()).device
    parts = [frames[i : i + ENCODED_AT_ONCE] for i in range(0, len(frames), ENCODED_AT_ONCE)]
    return torch.cat([encoder(to_float(part).to(device)) for part in parts])


def _write(folder: Path, arm: str, visual_EVK: Tensor, titles: list[Title], cfg) -> dict[str, list[str]]:
    """What an arm writes for the held-out clips; for realigned also after each further round."""
    model, vocabulary = load_realigner(folder)
    model = model.to(visual_EVK.device)
    texts = ["" if arm == "scratch" else title.text for title in titles]
    written = {}
    for number in range(1, 1 + (cfg.num_rounds if arm == "realigned" else 1)):
        texts = rewrite(model, vocabulary, visual_EVK, texts)
        written[arm if number == 1 else f"{arm}_{number}_rounds"] = texts
    return written


def _write_captions(path: Path, titles: list[Title], written: dict[str, list[list[str]]]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        arms = [arm for arm in written if arm != "raw"]
        rows.writerow(["kind", "title", "truth", *arms])
        for i, title in enumerate(titles):
            rows.writerow([title.kind, title.text, title.truth, *(written[arm][0][i] for arm in arms)])
    temporary.replace(path)


def write_stores(data: Path, episodes: np.ndarray, captions: dict[str, list[str]], output: Path) -> None:
    """One frame store a name in `captions`, of these episodes of the store `data`, with those captions.

    They share their frames on disk where the file system can link files. `output` appears when all are complete.
    """
    store = json.loads((data / "store.json").read_text(encoding="utf-8"))
    index = load_arrays(data / "index.safetensors")
    offsets, size = index.pop("episode_offsets"), store["image_size"]
    frames = np.memmap(data / "frames.u8", np.uint8, "r", shape=(store["num_frames"], size, size, 3))
    spans = [slice(offsets[i], offsets[i + 1]) for i in episodes]
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    picked = {name: np.concatenate([values[span] for span in spans]) for name, values in index.items()}
    picked["episode_offsets"] = np.cumsum([0, *(span.stop - span.start for span in spans)], dtype=np.int64)
    of_clips = {name: [store[name][i] for i in episodes] for name in ("sources", "clips", "clip_fps") if name in store}
    first: Path | None = None
    for name, texts in captions.items():
        folder = temporary / name
        folder.mkdir(parents=True)
        if first is None:
            with (folder / "frames.u8").open("wb") as file:
                for span in tqdm(spans, desc="stores", unit="clip", mininterval=1.0):
                    file.write(np.ascontiguousarray(frames[span]).tobytes())
            first = folder / "frames.u8"
        else:
            try:
                os.link(first, folder / "frames.u8")
            except OSError:
                shutil.copyfile(first, folder / "frames.u8")
        save_arrays(picked, folder / "index.safetensors")
        described = {name: store[name] for name in ("version", "image_size", "fps")} | of_clips
        described |= {"num_frames": int(picked["episode_offsets"][-1]), "instructions": texts, "skipped": []}
        write_text(folder / "store.json", json.dumps(described, indent=1) + "\n")
    temporary.replace(output)
