"""Study `transfusion`: frames by diffusion or by discrete tokens, in one transformer with the instruction.

    told:       [start, colour, column | begin, patches of the future frame, end]      what will come
    described:  [begin, patches of the future frame, end | start, colour, column]      what was done

The patches of the present frame are joined to those of the future one, as in pretraining. A fifth of the training
samples is described. Every arm has the same data and the same floating-point operations in
training, so an arm whose step costs more takes fewer steps.

    transfusion   linear patches, patches of a frame see each other, loss = words + 5 x frame, noise cap 0.5
    vq_frames     the same transformer on words and patch codes of a k-means codebook, next token (Chameleon's way)
    regression    the same transformer predicts the frame at once: no noise, no sampling (the dense control)
    causal_mask   patches see only the patches before them
    lambda_1      loss = words + frame
    no_cap        described samples are as noisy as the others
    unet          U-Net patches
    wide          linear patches, and a feed-forward that gives it as many parameters as unet has
    noise         the noise is predicted, as in the paper, not the frame
    flow          flow matching in place of diffusion

Shapes: B clips, C channels, H W pixels, P patches, S sequence, D width, W words, K codes.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lapa.backbones.base import IMAGE, NO_BLOCK, TEXT, Cache, Layout, build_backbone
from lapa.latent_vla.diffusion import NoiseProcess, Predict
from lapa.latent_vla.objectives import draw_frames
from lapa.latent_vla.patches import to_images, to_patches
from lapa.latent_vla.transfusion import FrameDenoiser, extend, run_in_order
from lapa.metrics import psnr_db
from lapa.runtime import Compute
from lapa.schema import DenseBackbone, FutureFrame, Training, TransfusionStudy
from lapa.studies.moving_blocks import NUM_WORDS, WORDS, Clips, draw_clips, frame_errors
from lapa.studies.study import Arm
from lapa.trainer import finish, fit

FUTURE_BLOCK = 0
DESCRIBED_SHARE = 0.2
FRAME_WEIGHT = 5.0
FrameLoss = Callable[[Tensor], Tensor]
EVALUATION_SEED = 1_000_000  # no training seed comes near it

COLUMNS = [
    "right_share",
    "position_error_px",
    "lower_share",
    "psnr_db",
    "instruction_accuracy",
    "num_steps",
    "training_gigaflops",
    "sampling_megaflops",
    "num_parameters",
    "wall_time_s",
]
NOTES = """
`lapa study study=transfusion`. Of two blocks the named one moves to the named column, to its upper or its lower place
at a coin's toss; frames of 8 px, blocks of 2. position_error_px and psnr_db are of a sampled future frame of held-out
clips, to the nearest of the two right ones; right_share is the share within half a pixel, lower_share that of the lower
outcome (0.5 in the data). instruction_accuracy: colour and column both right, read from the two true frames; guessing
gives 1/12. Intervals are Student's over seeds. All arms spend the same floating-point operations in training
(training_gigaflops, forward passes alone); sampling_megaflops is one future frame. A regression that hedges between two
right futures shows in right_share.
"""


class Regression(NoiseProcess):
    """No noise at all: the frame, from nothing, in one call. Described samples see it clean."""

    def draw_times(self, count: int, generator: torch.Generator | None = None, most: Tensor | float = 1.0) -> Tensor:
        return (torch.as_tensor(most) == 1).float().expand(count)

    def scales(self, time_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        keep = 1 - time_B.view(-1, *[1] * (like.ndim - 1))
        return keep, torch.zeros_like(keep)

    def sample(
        self,
        predict: Predict,
        start: Tensor,
        num_steps: int,
        limit: Tensor | float = float("inf"),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        bound = torch.as_tensor(limit, device=start.device)
        return predict(torch.zeros_like(start), torch.ones(len(start), device=start.device)).clamp(-bound, bound)


class ClipModel(nn.Module):
    """What the arms share: words, and sequences in which they come first or last."""

    def __init__(self, backbone: DenseBackbone):
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.word = nn.Parameter(torch.randn(len(WORDS) + 1, backbone.width))  # the last one starts an instruction
        self.next_word = nn.Linear(backbone.width, len(WORDS))

    def future(self, clips: Clips, is_described_B: Tensor) -> tuple[Tensor, Tensor, FrameLoss]:
        """The future frame's tokens (B, P + 2, D), their block ids, and its loss an image, of their hidden states."""
        raise NotImplementedError

    def total(self, word_loss: Tensor, frame_loss: Tensor) -> Tensor:
        """The loss of a batch, of mean nats a word and the mean loss of a frame."""
        raise NotImplementedError

    def imagine(self, clips: Clips, generator: torch.Generator) -> Tensor:
        """A sample of the future (B, 3, H, W) in [-1, 1], told the words and the present frame."""
        raise NotImplementedError

    def append_future(self, cache: Cache, clips: Clips) -> None:
        """The true future frame, clean, after the tokens of the cache."""
        raise NotImplementedError

    def words(self, words_BW: Tensor) -> Tensor:
        """Start and words (B, 1 + W, D)."""
        return self.word[F.pad(words_BW, (1, 0), value=len(WORDS))]

    def loss(self, clips: Clips) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and numbers to log."""
        is_described_B = torch.rand(len(clips.words_BW)) < DESCRIBED_SHARE
        words_BWD = self.words(clips.words_BW)
        frame_BPD, block_ids_BP, loss_of = self.future(clips, is_described_B)
        num_words, num_patches = words_BWD.shape[1], frame_BPD.shape[1] - 2
        modality_ids_S = torch.tensor([*[TEXT] * (num_words + 1), *[IMAGE] * num_patches, TEXT])
        modality_ids_BS = modality_ids_S.expand(len(words_BWD), -1)
        layout = Layout.of(modality_ids_BS, F.pad(block_ids_BP, (num_words, 0), value=NO_BLOCK))
        places_S = torch.arange(len(modality_ids_S))
        order_BS = torch.where(is_described_B[:, None], places_S.roll(-num_words), places_S)
        hidden_BSD = run_in_order(self.backbone, torch.cat([words_BWD, frame_BPD], dim=1), layout, order_BS)
        logits_BWK = self.next_word(hidden_BSD[:, : num_words - 1])
        word_nats_BW = F.cross_entropy(logits_BWK.transpose(1, 2), clips.words_BW, reduction="none")
        frame_loss = loss_of(hidden_BSD[:, num_words:]).mean()
        return self.total(word_nats_BW.mean(), frame_loss), {
            "frame_loss": frame_loss.detach(),
            "word_nats": word_nats_BW.detach().mean(),
        }

    @torch.no_grad()
    def describe(self, clips: Clips) -> Tensor:
        """Colour and column (B, 2) int64, greedily, from the two frames."""
        cache = Cache()
        self.append_future(cache, clips)
        chosen_BW = torch.full((len(clips.words_BW), 1), len(WORDS))
        for _ in range(NUM_WORDS):
            hidden_B1D = extend(self.backbone, self.word[chosen_BW[:, -1:]], TEXT, cache)
            chosen_BW = torch.cat([chosen_BW, self.next_word(hidden_B1D).argmax(-1)], dim=1)
        return chosen_BW[:, 1:]

    def told(self, clips: Clips) -> Cache:
        """The words, in a cache."""
        cache = Cache()
        extend(self.backbone, self.words(clips.words_BW), TEXT, cache)
        return cache


class DenoisingClipModel(ClipModel):
    """Frames as patches of pixels."""

    def __init__(
        self,
        backbone: DenseBackbone,
        frame: FutureFrame,
        process: NoiseProcess | None = None,
        frame_weight: float = FRAME_WEIGHT,
    ):
        super().__init__(backbone)
        self.frame = FrameDenoiser(backbone.width, frame, condition_channels=3)
        if process is not None:
            self.frame.process = process
        self.max_noise, self.num_sampling_steps = frame.frame_first_max_noise, frame.num_sampling_steps
        self.frame_weight = frame_weight

    def future(self, clips: Clips, is_described_B: Tensor) -> tuple[Tensor, Tensor, FrameLoss]:
        process, noise_BCHW = self.frame.process, torch.randn_like(clips.future_BCHW)
        time_B = process.draw_times(len(is_described_B), None, torch.where(is_described_B, self.max_noise, 1.0))
        noised_BCHW = process.corrupt(clips.future_BCHW, noise_BCHW, time_B)
        patches_BPD, read = self.frame.embed(noised_BCHW, time_B, clips.present_BCHW)
        tokens_BPD, _, block_ids_BP = self.frame.enclose(patches_BPD, FUTURE_BLOCK)
        return (
            tokens_BPD,
            block_ids_BP,
            lambda hidden_BPD: self.frame.loss(read(hidden_BPD[:, 1:-1]), clips.future_BCHW, noise_BCHW),
        )

    def total(self, word_loss: Tensor, frame_loss: Tensor) -> Tensor:
        return word_loss + self.frame_weight * frame_loss

    def append_future(self, cache: Cache, clips: Clips) -> None:
        batch = len(clips.words_BW)
        patches_BPD, _ = self.frame.embed(clips.future_BCHW, torch.zeros(batch), clips.present_BCHW)
        extend(self.backbone, self.frame.begin.expand(batch, 1, -1), TEXT, cache)
        extend(self.backbone, patches_BPD, IMAGE, cache, FUTURE_BLOCK)
        extend(self.backbone, self.frame.end.expand(batch, 1, -1), TEXT, cache)

    @torch.no_grad()
    def imagine(self, clips: Clips, generator: torch.Generator) -> Tensor:
        start_BCHW = torch.randn(clips.future_BCHW.shape, generator=generator)
        return self.frame.append(
            self.backbone, self.told(clips), start_BCHW, self.num_sampling_steps, FUTURE_BLOCK, clips.present_BCHW
        )


class CodedClipModel(ClipModel):
    """Frames as codes of patches, each predicted from those before it and the present frame's code at its place.

    Args:
        codebook_KC: patches of pixels (K, 3 * k * k).
    """

    codebook_KC: Tensor

    def __init__(self, backbone: DenseBackbone, codebook_KC: Tensor, patch_size: int, image_size: int):
        super().__init__(backbone)
        self.patch_size, self.side = patch_size, image_size // patch_size
        self.num_patches = self.side**2
        self.register_buffer("codebook_KC", codebook_KC)
        self.code = nn.Parameter(torch.randn(len(codebook_KC), backbone.width) * 0.5)
        self.present_code = nn.Parameter(torch.randn(len(codebook_KC), backbone.width) * 0.5)
        self.position = nn.Parameter(torch.randn(self.num_patches, backbone.width) * 0.5)
        self.begin = nn.Parameter(torch.randn(backbone.width))
        self.end = nn.Parameter(torch.randn(backbone.width))
        self.next_code = nn.Linear(backbone.width, len(codebook_KC))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes (B, P) int64: the nearest patch of the codebook."""
        return torch.cdist(to_patches(images_BCHW, self.patch_size), self.codebook_KC).argmin(-1)

    def decode(self, codes_BP: Tensor) -> Tensor:
        """Images (B, 3, H, W)."""
        return to_images(self.codebook_KC[codes_BP], self.patch_size, self.side)

    def tokens(self, present_BP: Tensor, known_Bp: Tensor) -> Tensor:
        """Begin and the p codes known so far (B, p + 1, D), each with the present code where the next one comes."""
        begin_B1D = self.begin.expand(len(known_Bp), 1, -1)
        tokens_BPD = torch.cat([begin_B1D, self.code[known_Bp]], dim=1)
        next_BPD = self.present_code[present_BP] + self.position
        # After the last code comes no other.
        return tokens_BPD + F.pad(next_BPD, (0, 0, 0, 1))[:, : tokens_BPD.shape[1]]

    def future(self, clips: Clips, is_described_B: Tensor) -> tuple[Tensor, Tensor, FrameLoss]:
        codes_BP = self.encode(clips.future_BCHW)
        tokens_BPD = self.tokens(self.encode(clips.present_BCHW), codes_BP)
        tokens_BPD = torch.cat([tokens_BPD, self.end.expand(len(codes_BP), 1, -1)], dim=1)

        def loss(hidden_BPD: Tensor) -> Tensor:
            logits_BPK = self.next_code(hidden_BPD[:, :-2])
            return F.cross_entropy(logits_BPK.transpose(1, 2), codes_BP, reduction="none").mean(1)

        return tokens_BPD, torch.full(tokens_BPD.shape[:2], NO_BLOCK), loss

    def total(self, word_loss: Tensor, frame_loss: Tensor) -> Tensor:
        # Every token counts the same, be it of words or of a frame.
        return (NUM_WORDS * word_loss + self.num_patches * frame_loss) / (NUM_WORDS + self.num_patches)

    def append_future(self, cache: Cache, clips: Clips) -> None:
        tokens_BPD = self.tokens(self.encode(clips.present_BCHW), self.encode(clips.future_BCHW))
        extend(self.backbone, tokens_BPD[:, :1], TEXT, cache)
        extend(self.backbone, tokens_BPD[:, 1:], IMAGE, cache)
        extend(self.backbone, self.end.expand(len(tokens_BPD), 1, -1), TEXT, cache)

    @torch.no_grad()
    def imagine(self, clips: Clips, generator: torch.Generator) -> Tensor:
        cache, present_BP = self.told(clips), self.encode(clips.present_BCHW)
        codes_BP = present_BP[:, :0]
        for place in range(self.num_patches):
            token_B1D = self.tokens(present_BP, codes_BP)[:, -1:]
            hidden_B1D = extend(self.backbone, token_B1D, IMAGE if place else TEXT, cache)
            share_BK = self.next_code(hidden_B1D[:, 0]).softmax(-1)
            codes_BP = torch.cat([codes_BP, torch.multinomial(share_BK, 1, generator=generator)], dim=1)
        return self.decode(codes_BP)


def patch_codebook(study: TransfusionStudy, seed: int, num_rounds: int = 20) -> Tensor:
    """Patches (K, 3 * k * k) that stand for all others: k-means on the futures of 2,000 clips."""
    clips = draw_clips(2000, study.image_size, np.random.default_rng([seed, 1]))
    points_NC = to_patches(clips.future_BCHW, study.patch_size).flatten(0, 1)
    # Most patches are black; the codes begin at different ones.
    distinct_NC = points_NC.unique(dim=0)
    first = torch.randperm(len(distinct_NC), generator=torch.Generator().manual_seed(seed))[: study.codebook_size]
    codes_KC = distinct_NC[first]
    for _ in range(num_rounds):
        nearest_N = torch.cdist(distinct_NC, codes_KC).argmin(1)
        counts_K = nearest_N.bincount(minlength=len(codes_KC))
        sums_KC = torch.zeros_like(codes_KC).index_add(0, nearest_N, distinct_NC)
        codes_KC = torch.where(counts_K[:, None] > 0, sums_KC / counts_K.clamp(min=1)[:, None], codes_KC)
    return codes_KC


def builders(study: TransfusionStudy) -> dict[str, Callable[[int], ClipModel]]:
    """The arms: of the seed, a model with random weights."""
    # Rotary positions: words carry none of their own.
    backbone = DenseBackbone(
        width=study.width, num_layers=study.num_layers, num_heads=study.num_heads, rotary_theta=1e4
    )
    frame = FutureFrame(
        image_size=study.image_size,
        patch_size=study.patch_size,
        unet_channels=study.unet_channels,
        num_sampling_steps=study.num_sampling_steps,
    )
    unet = replace(frame, patches="unet")

    def denoising(backbone=backbone, frame=frame, **changes) -> Callable[[int], ClipModel]:
        return lambda seed: DenoisingClipModel(backbone, frame, **changes)

    def wide(seed: int) -> ClipModel:
        goal = num_parameters(DenoisingClipModel(backbone, unet))
        ratios = [backbone.feed_forward_ratio + step / 8 for step in range(64)]
        models = (DenoisingClipModel(replace(backbone, feed_forward_ratio=ratio), frame) for ratio in ratios)
        return next(model for model in models if num_parameters(model) >= goal)

    def coded(seed: int) -> ClipModel:
        return CodedClipModel(backbone, patch_codebook(study, seed), study.patch_size, study.image_size)

    return {
        "transfusion": denoising(),
        "vq_frames": coded,
        "regression": denoising(process=Regression()),
        "causal_mask": denoising(replace(backbone, mask="causal")),
        "lambda_1": denoising(frame_weight=1.0),
        "no_cap": denoising(frame=replace(frame, frame_first_max_noise=1.0)),
        "unet": denoising(frame=unet),
        "wide": wide,
        "noise": denoising(frame=replace(frame, predicts="papers")),
        "flow": denoising(frame=replace(frame, process="flow")),
    }


def arms(study: TransfusionStudy) -> list[Arm]:
    """See the top of this file."""
    models = builders(study)

    def arm(name: str, build: Callable[[int], ClipModel]) -> Arm:
        return Arm(
            name, lambda seed, folder, compute: run_arm(study, build, models["transfusion"], seed, folder, compute)
        )

    return [arm(name, build) for name, build in models.items()]


def run_arm(
    study: TransfusionStudy,
    build: Callable[[int], ClipModel],
    build_first: Callable[[int], ClipModel],
    seed: int,
    folder: Path,
    compute: Compute,
) -> dict[str, float]:
    """Train one model with the first arm's operations and measure it on held-out clips."""
    flops, first_flops = (training_flops(make(seed), study) for make in (build, build_first))
    num_steps = max(1, round(study.num_steps * first_flops / flops))
    torch.manual_seed(seed)
    model = build(seed)
    training = Training(
        num_steps=num_steps,
        batch_size=study.batch_size,
        learning_rate=study.learning_rate,
        warmup_steps=min(100, num_steps // 10 + 1),
        ema_decay=0.99,
        log_every_steps=50,
        checkpoint_every_steps=500,
        tensorboard=False,
        seed=seed,
    )
    fit(
        model,
        lambda rng: draw_clips(study.batch_size, study.image_size, rng),
        model.loss,
        training,
        replace(compute, device=torch.device("cpu")),
        folder,
        description=folder.name,
    )
    finish(folder)
    return {
        **measure(model, study, seed, folder),
        "num_steps": num_steps,
        "training_gigaflops": num_steps * study.batch_size * flops / 1e9,
        "sampling_megaflops": sampling_flops(model, study) / 1e6,
        "num_parameters": num_parameters(model),
    }


@torch.no_grad()
def measure(model: ClipModel, study: TransfusionStudy, seed: int, folder: Path) -> dict[str, float]:
    """Numbers on held-out clips, and a picture of some."""
    clips = draw_clips(study.num_eval_clips, study.image_size, np.random.default_rng(EVALUATION_SEED))
    generator = torch.Generator().manual_seed(seed)
    frames_BCHW = model.imagine(clips, generator)
    errors = frame_errors(frames_BCHW, clips)
    found = {
        "psnr_db": psnr_db(errors.pop("squared_error")),
        **errors,
        "instruction_accuracy": (model.describe(clips) == clips.words_BW).all(1).float().mean().item(),
    }
    if isinstance(model, CodedClipModel):
        # What the codebook alone leaves over: no sample can be better.
        coded = frame_errors(model.decode(model.encode(clips.future_BCHW)), clips)
        found["codebook_psnr_db"] = psnr_db(coded["squared_error"])
        found["codebook_position_error_px"] = coded["position_error_px"]
    shown = {"present": clips.present_BCHW, "future": clips.future_BCHW, "sampled": frames_BCHW}
    draw_frames({name: (images[:10] + 1) / 2 for name, images in shown.items()}, folder)
    return found


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops(model: ClipModel, study: TransfusionStudy) -> float:
    """Of one clip's forward pass; the backward pass costs about twice as much in every arm."""
    clips = draw_clips(4, study.image_size, np.random.default_rng(0))
    return count_flops(lambda: model.loss(clips)) / 4


def sampling_flops(model: ClipModel, study: TransfusionStudy) -> float:
    """Of one future frame, the words and the present frame included."""
    clips = draw_clips(1, study.image_size, np.random.default_rng(0))
    model.requires_grad_(False)  # the profiler's hooks want a history of what has a gradient
    return count_flops(lambda: model.imagine(clips, torch.Generator().manual_seed(0)))


def count_flops(call: Callable[[], Any]) -> int:
    # The fused attention of the CPU is not in the profiler's list; its plain form is.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()
