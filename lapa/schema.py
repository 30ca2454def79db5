"""Every option of every stage, once: name, default, unit.

One dataclass a stage. YAML under `configs/` says only what differs from here; the CLI turns the
composed configuration into these objects, and nothing below the CLI sees OmegaConf.
"""

from dataclasses import dataclass, field
from typing import Any

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
    """`lapa demos`: scripted experts act in simulation; episodes go to LeRobotDataset v3 folders.

    Families: reach, block_to_block, block_to_absolute, block_to_side, block_to_relative, separate_blocks.
    """

    output_dir: str = MISSING
    env: str = "tabletop"  # a suite, or some of its tasks: suite/task,task or suite/group (docs/simulators.md)
    families: list[str] = field(default_factory=lambda: ["reach"])  # tasks of env=tabletop
    num_episodes: int = 100  # in all tasks together
    seed: int = 0  # episode i starts from seed + i
    split: str = "train"  # train (seen blocks and phrasings) | unseen | unseen_blocks | unseen_phrases
    image_size: int = 64
    num_blocks_min: int = 4
    num_blocks_max: int = 8
    variant: str = "default"
    action_repeat: int = 0  # simulator steps per action (metaworld); 0: the suite's own
    action_noise_m: float = 0.004  # standard deviation of the expert's disturbance, per step
    action_noise_share: float = 0.1  # the same where actions are no metres: a share of half of each one's range
    play: bool = False  # dawdling (pauses, detours, ways back) to goals that the data set does not tell
    video: bool = True  # also write the episodes without actions and states
    mp4: bool = False  # also write one plain mp4 file an episode, with captions.csv
    num_workers: int = 2


@dataclass
class Captioner:
    """Who writes the caption of a clip: the data set itself, or a model that looks at it."""

    # given (what came with the clip) | vlm (a Hugging Face image-text-to-text model) | realigner (edits what came)
    name: str = "given"  # given | vlm | realigner
    only_missing: bool = True  # leave the clips alone that came with a caption; a realigner needs false
    model: str | None = None  # vlm: a local folder with config, processor and safetensors; realigner: seed<n>/realigned
    prompt: str = "Describe in one short sentence what is done in this video."
    num_frames: int = 4  # frames shown, spread evenly over the clip
    batch_size: int = 8  # clips captioned at once
    max_new_tokens: int = 40  # vlm
    num_rounds: int = 1  # realigner: each round edits what the one before wrote
    device: str = "auto"  # auto | cpu | cuda | cuda:N


@dataclass
class ClipFilters:
    """Which clips are left out; what is rejected stays in the manifest, with the filter and the number found."""

    min_frames: int = 16
    min_duration_s: float = 0.0  # 0: off
    max_duration_s: float = 0.0  # 0: off
    min_motion: float = 0.0  # mean displacement in picture heights a second; 0: off
    max_motion: float = 0.0  # the same; 0: off
    min_sharpness: float = 0.0  # variance of the Laplacian in squared grey levels, median over the clip; 0: off
    max_dark_share: float = 1.0  # of the clip's time that is black; 1: off
    max_still_share: float = 1.0  # of the clip's time in which nothing changes; 1: off
    shots: str = "off"  # off | reject (clips with a cut) | split (one clip a shot)
    shot_detector: str = "content"  # content (PySceneDetect) | transnetv2 (learned, finds dissolves too)
    shot_threshold: float | None = None  # null: the detector's own, 27 for content (of 255), 0.5 for transnetv2
    max_text_share: float = 1.0  # of the picture covered by text (RapidOCR, about 1.5 s a clip); 1: off
    languages: list[str] = field(default_factory=list)  # keep captions in these (ISO 639-1: en, de, ...); empty: all


@dataclass
class IngestConfig:
    """`lapa ingest`: video from any source becomes curated clips in one memory-mapped frame store."""

    path: str = MISSING
    output_dir: str = MISSING
    image_size: int = 64
    captions: str | None = None  # CSV with the columns path, caption and a source column; default: clips.csv in path
    source_column: str = "lab"
    layout: str = "auto"  # how the clips lie on disk: see docs/video_data.md; auto: told by what is in path
    licence: str = ""  # of the clips whose data set states none; counted as unknown where empty
    camera: str | None = None  # LeRobot, RLDS: which image feature; default: the first by name that is no depth image
    keep_actions: bool = False  # LeRobot: also refer to the episode's actions and states, for finetuning
    image_fps: float = 10.0  # frames/s of layouts that store images without a rate (laq_jpeg, rlds)
    window_s: float = 4.0  # Ego4D: length of the clip around a narration, which has one point in time
    download_dir: str | None = None  # where rows with a URL are downloaded to; null: a missing file is rejected
    attempts: int = 3  # downloads of one URL before its rows are rejected
    captioner: Captioner = field(default_factory=Captioner)
    motion: str = "codec"  # codec (motion vectors of the decoder, optical flow where it has none) | flow | off
    samples_per_s: float = 2.0  # frames a second of video on which motion, sharpness and brightness are measured
    filters: ClipFilters = field(default_factory=ClipFilters)
    duplicates: str = "mark"  # mark (in manifest and report) | reject (keep the first) | off
    export: str = "none"  # none | lerobot: also write the kept clips as a LeRobotDataset v3 into <output_dir>/lerobot
    export_keyframe_interval: int = 0  # frames; 0: copy the packets as they are; n: encode anew, for random access
    num_shards: int = 1  # split a large corpus into this many runs, each with its own output_dir
    shard: int = 0  # which of them this run is
    runner: str = "local"  # local (processes of this machine) | ray (Ray Data, output_dir on a disk that all nodes see)
    num_workers: int = 2


@dataclass
class ConvertConfig:
    """`lapa convert`: a LeRobotDataset v2.1 becomes v3.0, in <output_dir>/lerobot; the source is only read.

    Every episode is looked at whole first: one whose rows, timestamps or video are broken is left out, and counted.
    Videos are joined without encoding them anew; statistics are computed anew, from every row and frame.
    """

    data: str = MISSING  # folder of a LeRobotDataset v2.1, or v2.0
    output_dir: str = MISSING
    episodes: list[int] = field(default_factory=list)  # only these of the source, numbered anew; empty: all
    data_file_size_mb: int = 100  # of parquet and video files: a new one begins where an episode would make it larger
    video_file_size_mb: int = 200
    num_workers: int = 2


@dataclass
class RealignerModel:
    """A small captioner that reads a noisy title (after Altogether, arXiv 2410.17251)."""

    num_frames: int = 2  # of a clip that are looked at, spread from first to last
    encoder_width: int = 32
    num_visual_tokens: int = 4  # attention maps over the frames, and one of what is anywhere in them
    num_prefix_tokens: int = 4
    width: int = 64  # of mapper and decoder
    num_heads: int = 4
    num_mapper_layers: int = 1
    num_layers: int = 2  # of the decoder
    max_title_words: int = 20  # the rest is cut off
    max_caption_words: int = 16


@dataclass
class TrainRealignerConfig:
    """`lapa train_realigner`: clips with true captions teach a captioner to edit noisy titles; measured on others.

    The model in seed<n>/realigned is what `lapa ingest captioner.name=realigner captioner.model=...` takes.
    """

    data: str = MISSING  # a frame store written by `lapa ingest`, with true captions of coloured objects
    output_dir: str = MISSING
    num_training_clips: int = 2000  # the others are held out: measured, and written with raw, realigned, true captions
    holdout_seed: int = 0  # which clips are held out, and their titles
    realigner: RealignerModel = field(default_factory=RealignerModel)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of the arms; they share one image encoder
    encoder_steps: int = 2500  # of the image encoder, before it is frozen
    num_steps: int = 500  # of each arm
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 50
    empty_title_share: float = 0.5  # of the titles in training that are replaced by nothing
    num_rounds: int = 2  # rounds of editing that are measured
    checkpoint_every_steps: int = 100
    device: str = "auto"  # auto | cpu | cuda | cuda:N


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
    """A spatio-temporal transformer after the paper's (arXiv 2410.11758), quicker and without collapse."""

    name: str = "transformer"
    patch_size: int = 8
    width: int = 256
    num_heads: int = 8
    num_spatial_layers: int = 4
    num_temporal_layers: int = 4
    num_decoder_layers: int = 4
    num_keypoints: int = 32  # whose displacement between the frames gives the latent action
    motion_radius: float = 0.2  # usual motion that the forward model tries, as a share of the image


@dataclass
class LAQQuantizer(QuantizerModel):
    """The architecture of the released quantizer (laq_openx.pt), for its weights and for comparisons with it."""

    name: str = "laq"
    image_size: int = 256
    patch_size: int = 32
    width: int = 1024
    num_heads: int = 16
    head_width: int = 64
    num_spatial_layers: int = 8
    num_temporal_layers: int = 8
    num_decoder_layers: int = 8
    compat: bool = True  # as released; false: memory orders put right and causal in time, for training anew


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
class VQCodebook(Codebook):
    """Vector quantisation whose codes follow the mean of their latents (arXiv 1711.00937, appendix A)."""

    name: str = "vq"
    decay: float = 0.95  # of the moving averages, a step
    commitment_weight: float = 0.1  # of the squared distance between latents and codes, in the loss
    discard_threshold: float = 0.1  # of the uniform share; codes below it move to latents of the batch


@dataclass
class ResidualCodebook(VQCodebook):
    """Residual vector quantisation (arXiv 2107.03312): each level of a token quantises what the ones before left."""

    name: str = "residual"
    num_levels: int = 2  # codes a token


@dataclass
class LFQCodebook(Codebook):
    """Lookup-free quantisation (arXiv 2310.05737): a code is the signs of log2(codebook_size) numbers."""

    name: str = "lfq"
    entropy_weight: float = 0.1  # of (entropy of a sample's code - entropy of the batch's codes), in nats


@dataclass
class ContinuousCodebook(Codebook):
    """No codes but numbers: a Gaussian posterior kept near the unit normal (beta-VAE; Higgins et al. 2017)."""

    name: str = "continuous"
    code_length: int = 1
    codebook_size: int = 0  # there are no codes to count
    beta: float = 1e-3  # loss a nat of the latent action
    free_bits: float = 0.0  # nats a dimension that cost nothing


@dataclass
class SharedNSVQCodebook(Codebook):
    """One codebook for all tokens, without normalisation or replacement: the form of the released weights."""

    name: str = "shared_nsvq"


@dataclass
class Target:
    """What of the second frame a latent action must explain; trained with the quantizer, no part of it."""

    name: str = "pixels"


@dataclass
class PixelTarget(Target):
    """Its pixels: squared error as a share of the error of repeating the first frame."""

    name: str = "pixels"


@dataclass
class MotionPixelTarget(Target):
    """Its pixels, with more weight on those that change."""

    name: str = "motion_pixels"
    motion_weight: float = 4.0  # extra weight of a pixel that changes by a tenth of the full range, or more


@dataclass
class PerceptualTarget(Target):
    """Its pixels, structure and edges, without pretrained weights."""

    name: str = "perceptual"
    similarity_weight: float = 0.5  # of 1 - multi-scale structural similarity, beside the pixel error
    gradient_weight: float = 0.5  # of the error of image gradients, beside the pixel error


@dataclass
class FeatureTarget(Target):
    """Its frozen image features (after UniVLA, arXiv 2505.06111)."""

    name: str = "features"
    source: str = "random_convolutions"  # transformers (DINOv2, DINOv3) | timm | random_convolutions (no weights)
    model: str | None = None  # transformers: folder or name; timm: name
    weights: str | None = None  # timm: a safetensors file
    local_files_only: bool = True  # transformers: false downloads a model that is named
    input_size: int | None = None  # pixels that images are resized to for the features; null: what the model wants
    seed: int = 0  # of random_convolutions
    width: int = 48  # of the feature forward model
    num_layers: int = 2  # of the feature forward model
    pixel_weight: float = 0.0  # share of the pixel error's gradient that reaches the latent action


@dataclass
class LatentConsistencyTarget(Target):
    """Its features under a moving average of an encoder trained with the quantizer (LAOM, arXiv 2502.00379)."""

    name: str = "latent_consistency"
    width: int = 32  # of the encoder; the forward model is twice as wide
    num_layers: int = 2  # of the feature forward model
    ema_decay: float = 0.99  # of the target encoder, per step
    max_gap_ratio: float = 1.0  # the inverse model looks 1 to this many frame gaps ahead (LAOM: more than 1)
    shift_pixels: int = 3  # random shift of both frames of a pair alike, in pixels; 0: off
    change_weight: float = 1.0  # of the hinge that keeps the features from ignoring what changes; 0: off
    pixel_weight: float = 0.0  # share of the pixel error's gradient that reaches the latent action


@dataclass
class LanguageConditioning:
    """First soak up what the instruction does not tell, then learn codes of what it does (UniVLA, arXiv 2505.06111)."""

    share_of_steps: float = 0.0  # 0: off; else of training.num_steps in which the instruction is seen, such as 0.3
    max_words: int = 16  # of an instruction; the rest is cut off


@dataclass
class ProprioceptionHead:
    """The latent action must also tell how the robot's state changes (villa-X, arXiv 2507.23682)."""

    weight: float = 0.0  # 0: off; else beside the target's loss; needs states in data.path or probe_data
    hidden_width: int = 128  # 0: a linear head


@dataclass
class GroundingHead:
    """The latent action must also tell the executed displacement, where it may be known (LAOM, arXiv 2502.00379)."""

    share_of_episodes: float = 0.0  # of the training episodes whose actions training may see; 0: none
    share_of_batch: float = 0.25  # of a batch that is drawn from these episodes
    weight: float = 1.0  # beside the target's loss
    hidden_width: int = 0  # 0: a linear head
    seed: int = 0  # which episodes


@dataclass
class MixturePart:
    """One data set of several; on the command line: mixture='[{path: a, weight: 2}, {path: b}]'."""

    path: str = MISSING  # a LeRobotDataset v3 folder or a frame store written by `lapa ingest`
    weight: float = 1.0  # its share of a batch, as a share of all weights
    labels: str | None = None  # of these data (pretrain): of `lapa label`; predict=action: of `lapa label_actions`
    embodiment: str = ""  # the robot (finetune): each gets statistics, action head and policy folder of its own


@dataclass
class PairData:
    """Frame pairs (t, t + gap) from clips; never across clips, never of gap zero."""

    path: str | None = None  # a LeRobotDataset v3 folder or a frame store written by `lapa ingest`
    mixture: list[MixturePart] = field(default_factory=list)  # several data sets, in place of path: docs/mixtures.md
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
    require_nearer_future: bool = True  # the prediction is nearer the second frame than the first
    require_all_codes: bool = True  # every code of the per-token vocabulary in use
    min_active_dimensions: int = 2  # of a continuous codebook, in place of the numbers on codes


@dataclass
class TrainQuantizerConfig:
    """`lapa train_quantizer`: frame pairs to latent actions that explain the change between them.

    In several processes that share every batch, with the results of one up to rounding (training.batch_size is the
    batch of all together, a multiple of their number; GPUs by NCCL, CPUs by Gloo; `pretrain` and `finetune` likewise):
        torchrun --nproc_per_node=2 -m lapa.cli train_quantizer output_dir=... data.path=...
    """

    output_dir: str = MISSING
    data: PairData = field(default_factory=PairData)
    model: QuantizerModel = MISSING
    codebook: Codebook = MISSING
    target: Target = field(default_factory=Target)
    language: LanguageConditioning = field(default_factory=LanguageConditioning)
    proprioception: ProprioceptionHead = field(default_factory=ProprioceptionHead)
    grounding: GroundingHead = field(default_factory=GroundingHead)
    num_eval_pairs: int = 2048
    # Training sees none of the actions in probe_data, unless grounding.share_of_episodes lets it see some.
    probe_data: str | None = None  # same episodes with actions (and states), for probe and gate; default: data.path
    gate: QuantizerGate = field(default_factory=QuantizerGate)
    training: Training = field(
        default_factory=lambda: Training(num_steps=600, batch_size=32, learning_rate=2e-3, checkpoint_every_steps=200)
    )
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class ImportLAQConfig:
    """`lapa import_laq`: the released quantizer's weights become a quantizer folder, for `lapa label` and the rest.

    Sizes are told by the tensors' shapes. Nothing in the file is run. Codes are exactly the released ones in
    runtime.dtype=float32; bfloat16 can move a latent that lies between two codes.
    """

    path: str = MISSING  # laq_openx.pt, or another state dict of that architecture
    output_dir: str = MISSING
    image_size: int = 256  # pixels; the weights do not tell
    frame_gap_s: float = 0.6  # between the two frames of a pair: 0.6 as trained on robots, 2.4 on human video


@dataclass
class EvaluateQuantizerConfig:
    """`lapa evaluate_quantizer`: metrics with intervals, pictures and the gate, for any quantizer on any data.

    Imported quantizers have no metrics of their own: evaluate them, then `lapa label evaluation=<output_dir>`.
    """

    quantizer: str = MISSING
    data: str = MISSING
    output_dir: str = MISSING
    probe_data: str | None = None  # same episodes with actions, for probes; default: data
    data2: str | None = None  # another data set, to whose scenes the latent actions are applied too
    episodes: str = "held_out"  # held_out (of the training data; all of other data) | all
    num_pairs: int = 2048
    seed: int = 0  # which pairs, donors and resamples; `lapa train_quantizer` takes data.holdout_seed
    cache_dir: str | None = None
    gate: QuantizerGate = field(default_factory=QuantizerGate)
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class CompareQuantizersConfig:
    """`lapa compare_quantizers`: runs of many quantizers become one table and one picture, averaged over seeds.

    The runs come from `lapa train_quantizer` or `lapa evaluate_quantizer`; a grid of them is one command:
        lapa train_quantizer --multirun data.path=... codebook=fsq,nsvq target=pixels,features training.seed=0,1,2 \\
            'output_dir=outputs/grid/${codebook.name}-${target.name}-seed${training.seed}'
        lapa compare_quantizers path=outputs/grid output_dir=outputs/grid/comparison
    """

    path: str = MISSING  # every folder in it with a run is compared
    output_dir: str = MISSING
    columns: list[str] = field(
        default_factory=lambda: [
            "linear_probe_r2",
            "mlp_probe_r2",
            "delta_psnr_db",
            "psnr_over_copy_db",
            "ssim_over_copy",
            "perplexity_of_ceiling",
            "vocabulary_utilisation",
            "transfer_kappa",
            "transfer_probe_r2",
        ]
    )


@dataclass
class TrainInverseConfig:
    """`lapa train_inverse`: a few demonstrations teach which actions lie between two frames (VPT, arXiv 2206.11795).

    The model looks at a pair of frames as the convolutional quantizer does, and tells all the actions between them.
    """

    output_dir: str = MISSING
    data: str = MISSING  # the demonstrations, with actions; nothing else is learned from
    test_data: str | None = None  # other episodes with actions, which only measure the model
    frame_gap_s: float = 0.3
    frame_gap_frames: int | None = None  # states the gap in frames, for clips whose clock is not real time
    holdout_fraction: float = 0.1  # of the demonstrations, by episode; measured, never trained on
    image_size: int = 64
    width: int = 24  # of the convolutions
    num_keypoints: int = 32  # whose displacement between the frames gives the actions
    random_shift_pixels: int = 4  # of both frames of a pair alike; 0: off
    num_test_pairs: int = 4096
    cache_dir: str | None = None
    training: Training = field(
        default_factory=lambda: Training(num_steps=1000, batch_size=32, learning_rate=2e-3, checkpoint_every_steps=200)
    )
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class LabelActionsConfig:
    """`lapa label_actions`: an inverse model writes the actions that it believes were executed in a video."""

    inverse: str = MISSING
    data: str = MISSING
    output_dir: str = MISSING
    # In these data, as long as the inverse model's gap; null: the same gap, for data of the same frame rate.
    frame_gap_frames: int | None = None
    batch_size: int = 256
    cache_dir: str | None = None
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class LabelConfig:
    """`lapa label`: the trained quantizer writes a latent action for every frame of a data set.

    The other sources are controls, at the quantizer's frame gap and with a vocabulary as large as its own: shuffled
    (its labels, given to other frames), pixel_differences (k-means on what changes in the picture, without learning),
    actions (k-means on the displacements truly executed: the best that so many codes can say).
    """

    quantizer: str = MISSING
    data: str = MISSING
    output_dir: str = MISSING
    source: str = "quantizer"  # quantizer | shuffled | pixel_differences | actions
    # source=shuffled: the quantizer's own, if they are there; null: it is asked again. The clusters' sources: labels of
    # another data set, whose clusters are taken; null: clusters are found in these data.
    labels: str | None = None
    action_data: str | None = None  # the same episodes with actions (source=actions)
    seed: int = 0  # of the shuffling and of k-means
    evaluation: str | None = None  # folder of `lapa evaluate_quantizer` with the gate; default: the quantizer's own
    export: str = "none"  # none | lerobot: also the data set with the labels as features, in <output_dir>/lerobot
    batch_size: int = 256
    cache_dir: str | None = None
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class Backbone:
    """Embeddings and the layout of a sequence in; hidden states out (lapa/backbones/base.py)."""

    name: str = MISSING
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    mask: str = "block_causal"  # block_causal (instruction and image see each other) | causal | bidirectional
    checkpoint_activations: bool = False  # recompute activations in the backward pass: less memory, a third more time


@dataclass
class DenseBackbone(Backbone):
    """Pre-norm transformer: RMSNorm, SwiGLU, fused attention."""

    name: str = "dense"
    feed_forward_ratio: float = 2.67
    query_key_norm: bool = True  # RMSNorm on queries and keys, for high learning rates
    num_key_value_heads: int = 0  # fewer than num_heads share keys and values among heads; 0: as many
    rotary_theta: float = 0.0  # base of rotary positions, such as 10000; 0: none, the embeddings carry positions


@dataclass
class MoTBackbone(DenseBackbone):
    """Mixture-of-transformers: weights of its own for every modality, attention over all tokens (arXiv 2411.04996).

    Modalities: text, image, latent_action, proprioception, robot_action.
    """

    name: str = "mot"
    untie: list[str] = field(  # what experts do not share: some of attention, feed_forward, norms
        default_factory=lambda: ["attention", "feed_forward", "norms"]
    )
    # Modalities that share an expert. The actions do, so that finetuning on robot actions begins with trained weights.
    merged: list[list[str]] = field(  # such as [[text,image]]; [] for an expert each
        default_factory=lambda: [["latent_action", "proprioception", "robot_action"]]
    )
    norm_placement: str = "pre"  # pre (before attention and feed-forward) | post (after each, as Chameleon's code)
    action_width: int = 0  # width of experts that see actions alone; 0: as the others


@dataclass
class MemoryOptions:
    """Memory layers (Memory+, arXiv 2412.09764): some feed-forwards become look-ups in one large table, for facts."""

    memory_layers: list[int] = field(default_factory=list)  # which layers, from 0; empty: spread around the middle
    num_memory_layers: int = 3  # where memory_layers is empty; at most every second layer
    num_half_keys: int = 64  # the table has the square of this many values
    num_memory_heads: int = 2
    num_best_slots: int = 4  # values that a head mixes
    key_width: int = 64  # of a query and a key, both halves together
    memory_gate: bool = True  # Memory+; false: plain memory, the mixed values as they are
    memory_query_key_norm: bool = True  # RMSNorm on the memory's queries and keys, for small models
    value_learning_rate_ratio: float = 10.0  # of the table, to training.learning_rate


@dataclass
class MemoryBackbone(MemoryOptions, DenseBackbone):
    """A dense transformer with memory layers."""

    name: str = "memory"


@dataclass
class MoTMemoryBackbone(MemoryOptions, MoTBackbone):
    """A mixture-of-transformers with memory layers; all experts read the same table."""

    name: str = "mot_memory"


@dataclass
class MoMaBackbone(DenseBackbone):
    """Mixture of modality-aware experts (arXiv 2407.21770): expert choice in training, auxiliary routers afterwards.

    Modalities: text, image, latent_action, proprioception, robot_action.
    """

    name: str = "moma"
    # Each expert is as wide as the dense feed-forward, so that a token costs what it costs there.
    groups: list[list[str]] = field(  # modalities that share experts; one group of all is a plain mixture of experts
        default_factory=lambda: [["text"], ["image"], ["latent_action", "proprioception", "robot_action"]]
    )
    num_experts: list[int] = field(default_factory=lambda: [4, 4, 1])  # of each group; 1: takes all, without a router
    capacity_factor: float = 1.0  # places in all experts of a group together, a token
    router_noise: float = 0.0  # times Gumbel-sigmoid noise on the choice in training; 1 as in the paper
    depth_capacity: float = 0.0  # mixture-of-depths: share of tokens in every other layer, 0.25 in the paper; 0: off


@dataclass
class HuggingFaceBackbone(Backbone):
    """A language or vision-language model of transformers, whole, frozen in parts, or with LoRA.

    With text=huggingface and image_tokenizer=huggingface the model's own vocabulary and vision tower are used too.
    """

    name: str = "huggingface"
    path: str | None = None  # folder of a model (config.json, safetensors, tokenizer.json), or its name on the hub
    local_files_only: bool = True  # false downloads a model that is named
    weights: str = "pretrained"  # pretrained | random (the same architecture, untrained)
    width: int = 0  # told by the model, as are num_layers and num_heads
    num_layers: int = 0
    num_heads: int = 0
    mask: str = "causal"  # causal (as most are trained) | block_causal (PaliGemma) | bidirectional
    model_config: dict[str, Any] | None = None  # transformers' config.json; null: read from path
    dtype: str = "float32"  # float32 | bfloat16: of the model's own weights; LoRA and heads stay float32
    freeze_language: bool = False  # its layers; LoRA freezes them anyway
    freeze_embeddings: bool = True  # its vocabulary; instructions use few rows, and weight decay shrinks the others
    freeze_vision: bool = True  # its vision tower and connector
    lora_rank: int = 0  # of adapters beside the language model's linear layers; 0: off
    lora_alpha: int = 16  # their sum is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0
    lora_targets: str = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"  # names of linear layers
    learning_rate_ratio: float = 1.0  # of the model's own weights and adapters, to training.learning_rate
    prompt: str | None = None  # with {image} and {instruction}; null: as the model was trained
    image_input_size: int = 0  # pixels that images are resized to for its vision tower; 0: as the model was trained
    rotary_dtype: str = "auto"  # auto (bfloat16 for a folder of `lapa import_lapa`) | float32 | bfloat16: of angles


@dataclass
class TextEncoder:
    """Instructions to tokens (lapa/backbones/text.py)."""

    name: str = MISSING


@dataclass
class WordText(TextEncoder):
    """One token a word, by stable hashing: no vocabulary, and no idea of spelling."""

    name: str = "words"
    max_words: int = 16  # of an instruction; the rest is cut off
    num_layers: int = 1  # of attention before words are summed up for the image tokenizer; 0: a bag of words


@dataclass
class ByteText(TextEncoder):
    """One token a byte: spelling is seen, no word is unknown, and sequences are some five times as long as in words."""

    name: str = "bytes"
    max_bytes: int = 96  # of an instruction in UTF-8; the rest is cut off
    lower_case: bool = False  # read capitals as small letters
    byte_width: int = 64  # of the vectors of bytes
    num_byte_layers: int = 1  # causal transformer layers over the bytes, before the backbone
    num_byte_heads: int = 4  # of these layers
    max_ngram: int = 0  # n-grams of 3 to this many bytes get embeddings too, by hashing; 0: none
    ngram_table_size: int = 2000  # embeddings for each n (500002 in the released BLT)


@dataclass
class BltText(ByteText):
    """Byte latent transformer (arXiv 2412.09871): one token a patch of bytes, where patches follow the text."""

    name: str = "blt"
    max_ngram: int = 8  # n-grams of 3 to this many bytes get embeddings too, by hashing; 0: none
    patcher: str = "entropy"  # entropy (a patch begins where a byte model is unsure) | space (words) | static
    mean_patch_bytes: float = 4.5  # entropy: the threshold is chosen so, on the data's instructions; static: the stride
    entropy_rule: str = "global"  # global (entropy) | monotonic (its rise) | combined (entropy, where it rises)
    queries_per_patch: int = 2  # vectors that look at a patch's bytes, concatenated
    entropy_width: int = 32  # of the byte model that finds patches
    num_entropy_layers: int = 1  # of the byte model
    num_entropy_heads: int = 2  # of the byte model
    entropy_steps: int = 300  # of its training, 64 instructions a step


@dataclass
class FutureFrame:
    """Pretraining also denoises the future frame, in the same sequence as the latent action (arXiv 2408.11039).

    The future frame is the one that the quantizer saw; only for labels that are codes.
    """

    weight: float = 0.0  # 0: off; of the denoising loss beside the latent tokens' cross-entropy, 5 in the paper
    process: str = "diffusion"  # diffusion (DDPM, cosine schedule) | flow (flow matching)
    # data (the clean frame: few steps suffice) | change (the same, as what is added to the present frame) |
    # papers (the noise; of flow the velocity)
    predicts: str = "data"
    image_size: int = 32  # pixels that the frame is resized to, to be denoised
    patches: str = "linear"  # linear (one matrix) | unet (convolutions and skip connections around the trunk)
    patch_size: int = 8  # pixels of the side of a token's patch
    unet_channels: int = 32  # of the convolutions, a multiple of 8 (patches=unet)
    frame_first_share: float = 0.2  # of the samples: the frame comes first, the latent action is read from it
    frame_first_max_noise: float = 0.5  # of the time from data to noise, in those samples; 1: no cap
    condition_dropout: float = 0.1  # share of samples without instruction and latent action, which guidance needs
    num_sampling_steps: int = 25  # of the sampled frames in metrics and pictures; 250 in the paper
    guidance: float = 1.0  # of those samples: 1: none; 3 to 5 in the paper


@dataclass
class HuggingFaceText(TextEncoder):
    """The vocabulary and embeddings of backbone=huggingface, with the prompt that the model was trained on."""

    name: str = "huggingface"
    tokenizer: str | None = None  # folder with tokenizer.json, hub name, or such a file; null: in backbone.path
    max_tokens: int = 64  # of the prompt with the instruction; words that do not fit are cut off


@dataclass
class GroundConfig:
    """`lapa ground`: the image tokenizer learns from video what an instruction is about.

    Every cell of a frame says whether what is in it will have left by the clip's last frame, and a moment from now.
    What is learned goes on to `pretrain.grounding`, or with `finetune.grounding` straight to a policy.
    """

    output_dir: str = MISSING
    data: str | None = None
    mixture: list[MixturePart] = field(default_factory=list)  # several data sets, in place of data: docs/mixtures.md
    test_data: str | None = None  # another data set that it is measured on and drawn for, such as the demonstrations
    text: TextEncoder = MISSING
    width: int = 128  # of the backbone that it is for
    image_size: int = 64
    full_change: float = 0.15  # mean absolute difference of a cell, of colours in [0, 1], that counts as changed
    next_s: float = 0.3  # what leaves its cell within it moves by itself: the body; seconds, at least one frame
    random_shift_pixels: int = 0  # augmentation, zero: off
    holdout_fraction: float = 0.05
    cache_dir: str | None = None
    training: Training = field(default_factory=lambda: Training(num_steps=2000, batch_size=32, learning_rate=3e-3))
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class PretrainConfig:
    """`lapa pretrain`: image and instruction to latent actions (or to actions: ActionVLA, VPT; to frames: UniPi)."""

    output_dir: str = MISSING
    data: str | None = None
    mixture: list[MixturePart] = field(
        default_factory=list
    )  # several data sets, in place of data and labels: docs/mixtures.md
    # latent | action (the upper bound, needs a data set with actions) | frame (what UniPi plans by)
    predict: str = "latent"
    labels: str | None = None  # folder of `lapa label`; needed for predict=latent
    latent_chunk_size: int = 1  # latent actions predicted at once, each a frame gap later (predict=latent, of codes)
    action_labels: str | None = None  # folder of `lapa label_actions`: predict=action learns these (VPT)
    action_data: str | None = None  # `lapa run` only: the same episodes with actions, for the arms that may see them
    backbone: Backbone = MISSING
    text: TextEncoder = MISSING
    image_size: int = 64
    image_tokenizer: str = "keypoints"  # keypoints (picked by the instruction) | grid (a token a patch)
    random_shift_pixels: int = 4  # augmentation, zero: off
    chunk_size: int = 4  # actions predicted at once (predict=action)
    action_head: str = "chunk"  # chunk | bins (predict=action); a policy with the same head goes on with it
    num_bins: int = 64
    future_frame: FutureFrame = field(default_factory=FutureFrame)
    frame_gap_s: float = 0.3  # from the present frame to the planned one (predict=frame)
    frame_gap_frames: int | None = None  # states it in frames, for clips whose clock is not real time
    grounding: str | None = None  # folder of `lapa ground`: text encoder and image tokenizer begin as they ended there
    grounding_warmup_steps: int = 300  # in which the rate of what is grounded rises from zero; 0: as all else
    # The same model, or one with a dense backbone that backbone=moma is upcycled from.
    init_from: str | None = None  # folder of `lapa pretrain` with the first weights; null: random ones
    ignore_gate: bool = False  # pretrain even on a quantizer that failed its gate
    holdout_fraction: float = 0.05
    cache_dir: str | None = None
    training: Training = field(default_factory=lambda: Training(num_steps=1000))
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class ImportLapaConfig:
    """`lapa import_lapa`: the released LAPA-7B weights become a Llama of transformers with a latent-action head."""

    path: str = MISSING  # the published file `params`: a stream of msgpack records
    output_dir: str = MISSING
    vqgan: str | None = None  # the published pickle `vqgan`, rewritten as vqgan.safetensors without running it
    num_heads: int = 32  # of the released model; its file does not say
    rope_theta: float = 5e7  # base of the rotary angles
    rms_norm_eps: float = 1e-6
    max_positions: int = 32768  # tokens, for config.json
    rotary_dtype: str = "bfloat16"  # bfloat16 | float32: what rotary angles were rounded to in training
    max_file_gb: float = 4.0  # 10^9 bytes of a safetensors file


@dataclass
class FinetuneConfig:
    """`lapa finetune`: a few robot demonstrations turn the pretrained model into a LeRobot policy."""

    output_dir: str = MISSING
    data: str | None = None
    mixture: list[MixturePart] = field(default_factory=list)  # several data sets, in place of data: docs/mixtures.md
    pretrained: str | None = None  # folder of `lapa pretrain`; null: Scratch, the same model from random weights
    grounding: str | None = None  # folder of `lapa ground`, for a policy that is not pretrained
    # Backbone, text encoder, image tokenizer and size: only for Scratch; otherwise the pretrained folder says.
    backbone: Backbone = MISSING
    text: TextEncoder = MISSING
    image_size: int = 64
    image_tokenizer: str = "keypoints"  # keypoints (picked by the instruction) | grid (a token a patch)
    random_shift_pixels: int = 4
    action_head: str = "chunk"  # chunk (L1) | bins (quantiles, as in the paper) | diffusion | flow (sampled chunks)
    num_bins: int = 64
    num_sampling_steps: int = 10  # from noise to a chunk (action_head=diffusion, flow)
    chunk_size: int = 4
    num_action_steps: int = 2  # of a chunk, before the policy looks again
    use_state: bool = False  # the policy also reads the robot's state (proprioception), observation.state of the data
    state_dropout: float = 0.0  # share of the samples in training whose state is hidden; policies like to copy it
    # Learn how far the robot shall go, where actions are positions; needs use_state.
    relative_actions: bool = False
    relative_to: str = "state"  # where from: state | last_action, which a joint that lags behind does not reach
    num_episodes: int | None = None  # the first n episodes only, of each data set; null: all
    pretrained_learning_rate_ratio: float = 0.05  # pretrained weights learn slower; a few demos would wreck them
    cache_dir: str | None = None
    training: Training = field(default_factory=lambda: Training(num_steps=150, learning_rate=2e-3, warmup_steps=20))
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class FinetuneUnipiConfig:
    """`lapa finetune_unipi`: demonstrations finish a planner of frames; an inverse model acts on its plans (UniPi).

    The planner comes from `lapa pretrain predict=frame`, the inverse model from `lapa train_inverse` (arXiv
    2302.00111).
    """

    output_dir: str = MISSING
    data: str = MISSING
    pretrained: str = MISSING
    inverse: str = MISSING
    random_shift_pixels: int = 4
    num_action_steps: int = 2  # before the policy plans again; at most the inverse model's frame gap
    num_sampling_steps: int = 5  # from noise to a planned frame
    guidance: float = 1.0  # 1: none
    pretrained_learning_rate_ratio: float = 0.05  # all of the planner is pretrained
    cache_dir: str | None = None
    training: Training = field(default_factory=lambda: Training(num_steps=150, learning_rate=2e-3, warmup_steps=20))
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class PreflightConfig:
    """`lapa preflight`: before a robot moves, checks of a data set and a policy for what a low loss hides.

    Each check says pass, warn, fail or skip and what to do; a failed one makes the command fail. Writes preflight.json
    and a picture of predicted against recorded actions for every episode of the open-loop check.
    """

    output_dir: str = MISSING
    data: str = MISSING  # a LeRobotDataset v3.0 of the robot
    policy: str | None = None  # any LeRobot policy folder; null: only the data are looked at
    checks: list[str] = field(
        default_factory=lambda: ["features", "units", "timing", "images", "open_loop", "overfit", "replay"]
    )
    rename_map: dict[str, str] = field(default_factory=dict)  # the data set's name of a feature: the policy's
    # Of the open-loop check; should be unknown to the policy. Empty: those behind the ones that `lapa finetune` says
    # it was trained on, else the last tenth.
    episodes: list[int] = field(default_factory=list)
    frame_stride: int = 1  # the open-loop check predicts from every n-th frame
    batch_size: int = 32  # frames predicted at once
    overfit_episode: int = 0  # a fresh policy of the same class must learn it by heart
    overfit_ratio: float = 0.5  # of the better baseline's error, that it must get below
    training: Training = field(  # of overfit
        default_factory=lambda: Training(num_steps=400, learning_rate=2e-3, batch_size=32, tensorboard=False)
    )
    # Replay: a Gymnasium id, and the seed of the first episode; null: told by the folder of `lapa demos`.
    replay_env: str | None = None
    replay_options: dict[str, Any] = field(default_factory=dict)  # of the environment
    replay_seed: int = 0
    num_replays: int = 3
    replay_tolerance: float = 0.001  # in units of the state, between recorded and simulated states
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class TrajectoryEdit:
    """How a trajectory is rewritten: idling and ways back are cut, the rest is smoothed."""

    idle_m: float = 0.01  # steps shorter than this are idling
    revisit_m: float = 0.02  # a path that comes back as near as this to where it was is cut in between
    # Each gives a candidate that stays this near the path, metres; the boldest that proves itself in replay is taken.
    smooth_m: list[float] = field(default_factory=lambda: [0.1, 0.05, 0.02])


@dataclass
class HindsightConfig:
    """`lapa hindsight`: a few labelled trajectories teach what unlabelled ones did, and which of them to learn from.

    Instruction back-and-forth translation (arXiv 2408.04614). Actions must be displacements.
    """

    output_dir: str = MISSING
    labelled: str = MISSING  # LeRobotDataset of a few demonstrations with instructions: the seed pairs
    data: str = MISSING  # LeRobotDataset of play; its instructions are ignored
    truth: str | None = None  # episodes.jsonl of `lapa demos play=true`: measures labels, adds an arm, teaches nothing
    arms: list[str] = field(
        default_factory=lambda: ["random", "unfiltered", "filter", "rewrite", "both", "distil", "truth"]
    )
    keep_share: float = 0.25  # of the play that every arm gets: the best of it, or as many at random
    holdout_share: float = 0.2  # of the labelled episodes; they calibrate the models, which never train on them
    temperature: float = 1.0  # of sampled instructions
    top_p: float = 0.9  # instructions are sampled from the likeliest that have this probability together
    num_backward_frames: int = 3  # of a trajectory, that are asked which instruction explains its end
    num_forward_frames: int = 10  # of a trajectory, whose actions are scored
    num_distractors: int = 4  # other instructions that an instruction must explain the actions better than
    edit: TrajectoryEdit = field(default_factory=TrajectoryEdit)
    # Of both models; the stage sets where from, where to and how many, and a chunk_size of 1 for the backward model.
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    # By slot, the words that can fill it: how labels are compared with the truth.
    slots: dict[str, list[str]] = field(
        default_factory=lambda: {
            "colour": ["red", "blue", "green", "yellow"],
            "object": ["cube", "moon", "star", "pentagon"],
        }
    )
    seed: int = 0  # of samples, distractors and random picks
    cache_dir: str | None = None  # decoded frames; default $LAPA_CACHE, else ~/.cache/lapa
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class ReplayConfig:
    """`lapa replay`: proposed actions, or a policy, begin recorded episodes again and become a data set."""

    output_dir: str = MISSING
    data: str = MISSING  # output_dir of `lapa demos`, which knows the seeds
    proposals: str = MISSING  # a file of `lapa hindsight`: episodes, instructions, candidate actions
    policy: str | None = None  # LeRobot policy folder that acts instead of candidates; null: candidates
    tolerance_m: float = 0.015  # between the ends of a candidate and of the episode: tip, and every block
    rest_m: float = 0.015  # a policy that moves less within 4 steps has finished
    device: str = "auto"  # of the policy: auto | cpu | cuda | cuda:N


@dataclass
class EvaluateConfig:
    """`lapa evaluate`: any LeRobot policy folder in simulation, on paired initial states."""

    policy: str = MISSING
    output_dir: str = MISSING
    env: str = "tabletop"  # a suite, or some of its tasks: suite/task,task or suite/group (docs/simulators.md)
    families: list[str] = field(default_factory=lambda: ["reach"])  # tasks of env=tabletop
    num_episodes: int = 100  # a task
    seed: int = 1_000_000  # episode i of a task starts from seed + i, for every policy alike
    split: str = "train"  # train (seen blocks and phrasings) | unseen | unseen_blocks | unseen_phrases
    image_size: int = 64
    num_blocks_min: int = 4
    num_blocks_max: int = 8
    variant: str = "default"
    action_repeat: int = 0  # simulator steps per action (metaworld); 0: the suite's own
    num_envs: int = 25  # that step together, as one batch of the policy
    num_videos: int = 4  # a task
    num_workers: int = 1  # processes that evaluate batches side by side, each with its own copy of the policy
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class Embodiment:
    """What a robot may be told: bounds of its actions and their rates, and when to stop (policies/serving/safety.py).

    configs/embodiment/ holds one file a robot; embodiment=custom takes all from the command line.
    """

    name: str = "custom"
    action_low: list[float] = MISSING  # one number an action dimension, in the robot's units
    action_high: list[float] = MISSING
    max_rate: list[float] = field(default_factory=list)  # largest change of a command in units/s; empty: none
    relative: bool = False  # actions are changes of position: max_rate limits them times control_hz
    control_hz: float = 10.0  # commands a second
    max_observation_age_s: float = 0.5  # an older observation stops the robot; 0: not checked
    watchdog_s: float = 1.0  # so long without a command stops the robot; 0: off
    on_limit: str = "clip"  # clip (an action beyond the limits is moved to them) | stop


@dataclass
class ExportConfig:
    """`lapa export`: a policy's network as ONNX, with proof that it acts the same."""

    output_dir: str = MISSING
    policy: str = MISSING  # folder of `lapa finetune`, lerobot-train or save_pretrained, of type lapa


@dataclass
class ServeConfig:
    """`lapa serve`: a policy behind WebSocket (openpi's clients work) and HTTP POST /act.

    On this machine alone, unless host says otherwise; then a token is required:
        export LAPA_SERVE_TOKEN=$(openssl rand -hex 32)
        lapa serve policy=outputs/quickstart/finetune/lapa-seed0 embodiment=tabletop host=0.0.0.0
    """

    policy: str = MISSING  # folder of `lapa finetune`, lerobot-train or save_pretrained, or of `lapa export`
    embodiment: Embodiment = MISSING
    host: str = "127.0.0.1"
    port: int = 8000
    token_env: str = "LAPA_SERVE_TOKEN"  # the environment variable that holds the token, at least 16 characters
    max_request_mb: float = 16.0  # 10^6 bytes of one message
    max_requests_per_s: float = 100.0  # of one client address, bursts of twice as many; 0: no limit
    max_connections: int = 16  # WebSockets at once
    max_waiting: int = 4  # requests in line for the policy; more are refused
    shutdown_s: float = 5.0  # how long requests at work may take after Ctrl-C
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class Study:
    """One experiment of the model zoo (lapa/studies/)."""

    name: str = MISSING


@dataclass
class FactsStudy(Study):
    """Facts that only memory answers, and a rule: dense, wide dense, mixture of experts, memory, Memory+."""

    name: str = "facts"
    num_facts: list[int] = field(default_factory=lambda: [1000, 2000, 4000])  # a model is trained for each number
    width: int = 16
    num_layers: int = 4
    num_heads: int = 2
    memory_layers: list[int] = field(default_factory=lambda: [1, 3])  # of Memory+; plain memory has the middle one
    num_half_keys: int = 64  # the table of the memory arms has the square of this many values
    num_memory_heads: int = 2
    num_best_slots: int = 4  # values that a head mixes
    key_width: int = 16  # of a memory's query, both halves together
    value_learning_rate_ratio: float = 10.0  # of the table, to the learning rate
    num_steps: int = 300
    batch_size: int = 256
    rule_share: float = 0.2  # of a batch; the rest are facts
    learning_rate: float = 0.016  # of all arms: for each of them better than half of it, on another seed


@dataclass
class NoisyTextStudy(Study):
    """Text encoders under noise on the letters: byte pairs, words, bytes, BLT's patches, at equal FLOPs."""

    name: str = "noisy_text"
    num_train: int = 4000  # clean instructions
    num_test: int = 400  # with combinations of words that training has not met
    capitals_share: float = 0.1  # of the instructions that are all in capitals
    width: int = 48  # of the backbone of plain bytes; the others' follow from their FLOPs
    num_layers: int = 2
    byte_width: int = 32
    ngram_table_size: int = 500  # embeddings for each n
    mean_patch_bytes: float = 4.5  # of static and entropy patches
    entropy_steps: int = 150  # of the byte model that finds patches
    byte_pair_vocabulary: int = 512
    training: Training = field(
        default_factory=lambda: Training(num_steps=300, batch_size=32, learning_rate=4e-3, tensorboard=False)
    )


@dataclass
class ModalitiesStudy(Study):
    """Weights of its own for every modality: dense, mixture-of-transformers in parts, in full, with two merged."""

    name: str = "modalities"
    data: str = MISSING  # episodes with actions and instructions, such as demos/ of `lapa demos`
    image_size: int = 64  # pixels, of the data
    patch_size: int = 16  # pixels; a patch is a token
    num_image_codes: int = 256
    num_action_bins: int = 16  # of each action dimension
    num_images: int = 2  # of a sequence
    frame_gap: int = 4  # frames from one image to the next; all actions between them are in the sequence
    holdout_fraction: float = 0.1  # of the episodes
    num_held_out: int = 192  # sequences of those
    width: int = 64  # of all arms but the wide one
    num_layers: int = 4
    num_heads: int = 4
    training: Training = field(
        default_factory=lambda: Training(
            num_steps=240,
            batch_size=32,
            learning_rate=6e-3,
            final_learning_rate_ratio=1.0,
            log_every_steps=20,
            tensorboard=False,
        )
    )


@dataclass
class CausalExpertsStudy(Study):
    """Experts by modality on causal sequences: what is left of their gain when routes may not see the future."""

    name: str = "causal_experts"
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    router_noise: float = 0.0  # times Gumbel-sigmoid noise on the choice in training
    second_phase_steps: int = 60  # of the auxiliary routers alone, after the model
    num_held_out: int = 256  # sequences
    curve_every_steps: int = 20  # between points of the held-out curve
    training: Training = field(
        default_factory=lambda: Training(
            num_steps=320, batch_size=16, learning_rate=4e-3, warmup_steps=30, tensorboard=False
        )
    )


@dataclass
class TransfusionStudy(Study):
    """Frames by diffusion or by discrete tokens, in one transformer with the instruction: moving blocks."""

    name: str = "transfusion"
    image_size: int = 8
    patch_size: int = 4  # pixels, of denoised patches and of coded ones
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    unet_channels: int = 16
    codebook_size: int = 512  # patches (arm vq_frames)
    num_steps: int = 500  # of the first arm; the others have as many as the same operations allow
    batch_size: int = 64
    learning_rate: float = 3e-3
    num_sampling_steps: int = 20
    num_eval_clips: int = 400


@dataclass
class StudyConfig:
    """`lapa study`: what a part of the model zoo is good for: every arm with every seed, a table with intervals.

    A run that is complete is not run again, so a study that was stopped goes on where it was, and a folder can be given
    more seeds or arms later. The table is of the seeds and arms that were asked for last.
    """

    output_dir: str = MISSING
    study: Study = MISSING
    arms: list[str] = field(default_factory=list)  # some of the study's arms; empty: all
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    runtime: Runtime = field(default_factory=Runtime)


@dataclass
class ReportConfig:
    """`lapa report`: tables and figures of a run directory, and one self-contained HTML page."""

    run_dir: str = MISSING
    output: str | None = None  # default: report.html in run_dir
    title: str | None = None
    baseline: str = "scratch"  # the arm that the others are compared with
    curve: str = "point"  # what the numbers in points/<number> count: the curve's horizontal axis


@dataclass
class RunConfig:
    """`lapa run`: every stage, in order, in one run directory; the stages' own options are nested."""

    run_dir: str = MISSING
    video_dir: str = MISSING  # of what comes of the videos alone: runs of the same videos and seeds may share it
    stages: list[str] = field(
        default_factory=lambda: [
            "demos",
            "train_quantizer",
            "label",
            "train_inverse",
            "label_actions",
            "ground",
            "pretrain",
            "finetune",
            "evaluate",
            "report",
        ]
    )
    # scratch | lapa | vpt | unipi | action_vla | controls: grounded, shuffled, pixel_kmeans, oracle, scratch_long
    arms: list[str] = field(default_factory=lambda: ["lapa", "scratch", "action_vla"])
    seeds: list[int] = field(default_factory=lambda: [0])
    evaluate_splits: list[str] = field(default_factory=list)  # evaluate each of these; empty: evaluate.split alone
    # Share of a batch of quantizer, grounding and pretraining that shows the demonstrations beside the videos; 0: none.
    demos_as_video: float = 0.0
    parallel_jobs: int = 1  # stages, later arms and seeds, at work at once, each with its share of the cores
    ingest: IngestConfig = field(default_factory=IngestConfig)
    # The many episodes seen as video; num_episodes=0: none, the videos are those of `ingest`.
    videos: DemosConfig = field(default_factory=DemosConfig)
    demos: DemosConfig = field(default_factory=DemosConfig)  # the few robot demonstrations
    train_quantizer: TrainQuantizerConfig = field(default_factory=TrainQuantizerConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    train_inverse: TrainInverseConfig = field(default_factory=TrainInverseConfig)
    label_actions: LabelActionsConfig = field(default_factory=LabelActionsConfig)
    # Made where pretrain.grounding or the arm grounded asks for it; text, width and image size are those of `pretrain`.
    ground: GroundConfig = field(default_factory=GroundConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    # Of the arm unipi; data, steps and rates are those of `finetune`.
    finetune_unipi: FinetuneUnipiConfig = field(default_factory=FinetuneUnipiConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    runtime: Runtime = field(default_factory=Runtime)  # overrides every stage's own


# Configuration groups: the file name in YAML or on the command line, and the dataclass behind it.
GROUPS: dict[str, dict[str, type]] = {
    "model": {"convolutional": ConvolutionalQuantizer, "transformer": TransformerQuantizer, "laq": LAQQuantizer},
    "codebook": {
        "nsvq": NSVQCodebook,
        "fsq": FSQCodebook,
        "vq": VQCodebook,
        "residual": ResidualCodebook,
        "lfq": LFQCodebook,
        "continuous": ContinuousCodebook,
        "shared_nsvq": SharedNSVQCodebook,
    },
    "target": {
        "pixels": PixelTarget,
        "motion_pixels": MotionPixelTarget,
        "perceptual": PerceptualTarget,
        "features": FeatureTarget,
        "latent_consistency": LatentConsistencyTarget,
    },
    "backbone": {
        "dense": DenseBackbone,
        "mot": MoTBackbone,
        "moma": MoMaBackbone,
        "memory": MemoryBackbone,
        "mot_memory": MoTMemoryBackbone,
        "huggingface": HuggingFaceBackbone,
    },
    "text": {"words": WordText, "bytes": ByteText, "blt": BltText, "huggingface": HuggingFaceText},
    "embodiment": {"custom": Embodiment},
    "study": {
        "causal_experts": CausalExpertsStudy,
        "facts": FactsStudy,
        "noisy_text": NoisyTextStudy,
        "modalities": ModalitiesStudy,
        "transfusion": TransfusionStudy,
    },
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
