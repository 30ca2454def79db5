"""Every option of every stage, once: name, default, unit.

One dataclass a stage. YAML under `configs/` says only what differs from here; the CLI turns the
composed configuration into these objects, and nothing below the CLI sees OmegaConf.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class Runtime:
    """Where and how tensors are computed; the same for every stage."""

    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto | float32 | bfloat16: autocast type, weights stay float32
    compile: bool = False
    num_threads: int = 0  # 0: as many as this process may use


@dataclass
class Training:
    """A plain AdamW loop with warm-up, cosine decay and clipping."""

    num_steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    warmup_steps: int = 50
    final_learning_rate_ratio: float = 0.05
    grad_clip: float = 1.0
    ema_decay: float = 0.0  # 0: off; else the saved weights are the moving average
    log_every_steps: int = 20
    checkpoint_every_steps: int = 200
    tensorboard: bool = True
    seed: int = 0


@dataclass
class DemosConfig:
    """`lapa demos`: scripted experts act in MuJoCo; episodes go to LeRobotDataset v3 folders.

    Families: reach, block_to_block, block_to_absolute, block_to_side, block_to_relative, separate_blocks.
    """

    output_dir: str = MISSING
    families: list[str] = field(default_factory=lambda: ["reach"])
    num_episodes: int = 100  # in all families together
    seed: int = 0  # episode i starts from seed + i
    split: str = "train"  # train (seen blocks and phrasings) | unseen | unseen_blocks | unseen_phrases
    image_size: int = 64
    num_blocks_min: int = 4
    num_blocks_max: int = 8
    variant: str = "default"
    action_noise_m: float = 0.004  # standard deviation of the expert's disturbance, per step
    video: bool = True  # also write the episodes without actions and states
    mp4: bool = False  # also write one plain mp4 file an episode, with captions.csv
    num_workers: int = 2


@dataclass
class IngestConfig:
    """`lapa ingest`: a folder of video files becomes one memory-mapped frame store."""

    path: str = MISSING
    output_dir: str = MISSING
    image_size: int = 64
    captions: str | None = None  # CSV with the columns path, caption and a source column; default: clips.csv in path
    source_column: str = "lab"
    min_frames: int = 16
    num_workers: int = 2


@dataclass
class QuantizerModel:
    """Which quantizer architecture; the two variants share one interface."""

    name: str = MISSING
    image_size: int = 64
    latent_dim: int = 32  # width of one latent action token before quantisation


@dataclass
class ConvolutionalQuantizer(QuantizerModel):
    """Inverse model and U-Net forward model for small compute."""

    name: str = "convolutional"
    width: int = 24
    num_keypoints: int = 32
    num_motions: int = 1  # motions of pixels a latent action can ask for at once
    motion_radius: float = 0.2  # farthest motion, as a share of the image


@dataclass
class TransformerQuantizer(QuantizerModel):
    """The paper's spatio-temporal transformer (arXiv 2410.11758)."""

    name: str = "transformer"
    patch_size: int = 8
    width: int = 256
    num_heads: int = 8
    num_spatial_layers: int = 4
    num_temporal_layers: int = 4
    num_decoder_layers: int = 4


@dataclass
class Codebook:
    """A latent action is `code_length` tokens, each one of `codebook_size` codes."""

    name: str = MISSING
    code_length: int = 4
    codebook_size: int = 8


@dataclass
class NSVQCodebook(Codebook):
    """Noise substitution in vector quantisation (Vali and Baeckstroem 2022), with code replacement."""

    name: str = "nsvq"
    replace_every_steps: int = 50
    replace_until_step: int = 1000
    discard_threshold: float = 0.1  # of the uniform share


@dataclass
class FSQCodebook(Codebook):
    """Finite scalar quantisation (arXiv 2309.15505)."""

    name: str = "fsq"


@dataclass
class PairData:
    """Frame pairs (t, t + gap) from clips; never across clips, never of gap zero."""

    path: str = MISSING  # a LeRobotDataset v3 folder or a frame store written by `lapa ingest`
    frame_gap_s: float = 0.4
    frame_gap_frames: int | None = None  # states the gap in frames, for clips whose clock is not real time
    holdout_fraction: float = 0.1  # of the episodes; never trained on, every metric is measured there
    holdout_sources: list[str] = field(default_factory=list)  # hold out these sources (labs) instead
    holdout_seed: int = 0
    cache_dir: str | None = None  # decoded frames; default $LAPA_CACHE, else ~/.cache/lapa


@dataclass
class QuantizerGate:
    """What a quantizer must show on held-out episodes before anything is pretrained on its codes."""

    min_perplexity_ratio: float = 0.05  # of codebook_size ** code_length, or of the number of pairs if smaller
    min_delta_psnr_db: float = 0.0
    require_beat_copy: bool = True
    require_all_codes: bool = True  # every code of the per-token vocabulary in use


@dataclass
class TrainQuantizerConfig:
    """`lapa train_quantizer`: frame pairs to latent actions that explain the change between them."""

    output_dir: str = MISSING
    data: PairData = field(default_factory=PairData)
    model: QuantizerModel = MISSING
    codebook: Codebook = MISSING
    motion_weight: float = 0.0  # 0: plain pixel error; else extra weight on pixels that change
    num_eval_pairs: int = 2048
    probe_data: str | None = None  # same episodes with actions, for probe and gate; default: data.path
    gate: QuantizerGate = field(default_factory=QuantizerGate)
    training: Training = field(
        default_factory=lambda: Training(num_steps=600, batch_size=32, learning_rate=2e-3, checkpoint_every_steps=200)
    )
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class LabelConfig:
    """`lapa label`: the trained quantizer writes a latent action for every frame of a data set."""

    quantizer: str = MISSING
    data: str = MISSING
    output_dir: str = MISSING
    batch_size: int = 256
    cache_dir: str | None = None
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class Backbone:
    """Embeddings, modality ids and mask in; hidden states out."""

    name: str = MISSING
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4


@dataclass
class DenseBackbone(Backbone):
    """Pre-norm transformer: RMSNorm, SwiGLU, fused attention."""

    name: str = "dense"
    feed_forward_ratio: float = 2.67
    query_key_norm: bool = True  # RMSNorm on queries and keys, for high learning rates


@dataclass
class PretrainConfig:
    """`lapa pretrain`: image and instruction to latent actions (or to true actions: ActionVLA)."""

    output_dir: str = MISSING
    data: str = MISSING
    target: str = "latent"  # latent | action (the upper bound, needs a data set with actions)
    labels: str | None = None  # folder of `lapa label`; needed for target=latent
    action_data: str | None = None  # `lapa run` only: the same episodes with actions, for the action_vla arm
    backbone: Backbone = MISSING
    image_size: int = 64
    image_tokenizer: str = "keypoints"  # keypoints (picked by the instruction) | grid (a token a patch)
    max_text_tokens: int = 16
    random_shift_pixels: int = 4  # augmentation, zero: off
    chunk_size: int = 4  # actions predicted at once (target=action)
    ignore_gate: bool = False  # pretrain even on a quantizer that failed its gate
    holdout_fraction: float = 0.05
    cache_dir: str | None = None
    training: Training = field(default_factory=lambda: Training(num_steps=1000))
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class FinetuneConfig:
    """`lapa finetune`: a few robot demonstrations turn the pretrained model into a LeRobot policy."""

    output_dir: str = MISSING
    data: str = MISSING
    pretrained: str | None = None  # folder of `lapa pretrain`; null: Scratch, the same model from random weights
    backbone: Backbone = MISSING  # only for Scratch; otherwise the pretrained folder says
    image_size: int = 64
    image_tokenizer: str = "keypoints"  # keypoints (picked by the instruction) | grid (a token a patch)
    max_text_tokens: int = 16
    random_shift_pixels: int = 4
    action_head: str = "chunk"  # chunk (continuous) | bins (quantile bins, as in the paper)
    num_bins: int = 64
    chunk_size: int = 4
    num_action_steps: int = 2  # of a chunk, before the policy looks again
    num_episodes: int | None = None  # the first n episodes only; null: all
    pretrained_learning_rate_ratio: float = 0.05  # pretrained weights learn slower; a few demos would wreck them
    cache_dir: str | None = None
    training: Training = field(default_factory=lambda: Training(num_steps=150, learning_rate=2e-3, warmup_steps=20))
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class EvaluateConfig:
    """`lapa evaluate`: any LeRobot policy folder in the tabletop suite, on paired initial states."""

    policy: str = MISSING
    output_dir: str = MISSING
    families: list[str] = field(default_factory=lambda: ["reach"])
    num_episodes: int = 100  # a family
    seed: int = 1_000_000  # episode i of a family starts from seed + i, for every policy alike
    split: str = "train"  # train (seen blocks and phrasings) | unseen | unseen_blocks | unseen_phrases
    image_size: int = 64
    num_blocks_min: int = 4
    num_blocks_max: int = 8
    variant: str = "default"
    num_envs: int = 25
    num_videos: int = 4  # a family
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class ReportConfig:
    """`lapa report`: one self-contained HTML page of a run directory."""

    run_dir: str = MISSING
    output: str | None = None  # default: report.html in run_dir
    title: str | None = None


@dataclass
class RunConfig:
    """`lapa run`: every stage, in order, in one run directory; the stages' own options are nested."""

    run_dir: str = MISSING
    stages: list[str] = field(
        default_factory=lambda: [
            "demos",
            "train_quantizer",
            "label",
            "pretrain",
            "finetune",
            "evaluate",
            "report",
        ]
    )
    arms: list[str] = field(default_factory=lambda: ["lapa", "scratch", "action_vla"])
    seeds: list[int] = field(default_factory=lambda: [0])
    ingest: IngestConfig = field(default_factory=IngestConfig)
    videos: DemosConfig = field(default_factory=DemosConfig)  # the many episodes seen as video
    demos: DemosConfig = field(default_factory=DemosConfig)  # the few robot demonstrations
    train_quantizer: TrainQuantizerConfig = field(default_factory=TrainQuantizerConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    runtime: Runtime = field(default_factory=Runtime)  # overrides every stage's own


# Configuration groups: the file name in YAML or on the command line, and the dataclass behind it.
GROUPS: dict[str, dict[str, type]] = {
    "model": {"convolutional": ConvolutionalQuantizer, "transformer": TransformerQuantizer},
    "codebook": {"nsvq": NSVQCodebook, "fsq": FSQCodebook},
    "backbone": {"dense": DenseBackbone},
}


def from_dict(group: str, values: dict):
    """The dataclass of `values["name"]` in `group`, from a saved config.json.

    Raises ValueError for a name we do not know, or a field that the dataclass lacks.
    """
    known = GROUPS[group]
    name = values.get("name")
    if name not in known:
        raise ValueError(f"unknown {group} {name!r}: known are {sorted(known)}")
    try:
        return known[name](**values)
    except TypeError as error:
        raise ValueError(f"{group} {name!r} does not take these fields: {error}") from None
