"""Stage `finetune`: a few demonstrations turn a pretrained trunk, or random weights, into a LeRobot policy.

The latent head is dropped and an action head takes its place (arXiv 2410.11758). A trunk pretrained on actions keeps
its head and its action statistics where they fit: the same action_head and chunk size. A kept head of bins knows ranks:
what the bins are is set anew by the demonstrations' quantiles. Denoising heads begin anew.

A mixture of several embodiments trains one trunk, with action statistics, an action head and a layer for the state of
each robot's own; every robot gets a policy folder, complete in itself, in output_dir/<embodiment>/.

Writes the policy folder (config.json, model.safetensors, policy_preprocessor.json, policy_postprocessor.json
and their state), log.jsonl and metrics.json.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE
from safetensors.torch import load_file
from torch import Tensor, nn

from lapa import distributed
from lapa.checkpoint import MODEL_FILE, load_config, read_json, write_json
from lapa.data import FrameStore, action_chunks, to_float
from lapa.latent_vla.grounding import start_grounded
from lapa.latent_vla.heads import BinnedActionHead, DenoisingActionHead
from lapa.latent_vla.vision import random_shift
from lapa.mixture import Mixture, concatenate, open_mixture
from lapa.runtime import setup
from lapa.schema import FinetuneConfig
from lapa.trainer import finish, fit
from policies.lapa.configuration_lapa import LapaConfig
from policies.lapa.modeling_lapa import LapaPolicy
from policies.lapa.processor_lapa import make_lapa_pre_post_processors


@dataclass(frozen=True)
class Robot:
    """One embodiment: a policy with its own statistics, action head and layer for the state, and its demonstrations.

    first_frame: where the frames of `store` begin in the mixture. chunks (N, T, A) and is_pad (N, T) are of its frames,
    with the action before as one row more where the policy reads it; states (N, P) too, or None where not read.
    """

    name: str
    store: FrameStore
    first_frame: int
    chunks: np.ndarray
    is_pad: np.ndarray
    states: np.ndarray | None
    policy: LapaPolicy
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    keeps_head: bool

    def batch(self, frames: np.ndarray, pixels: np.ndarray, device: torch.device) -> dict[str, Any]:
        """A batch of its policy, of frames (B,) numbered in `store`."""
        episodes = np.searchsorted(self.store.episode_offsets, frames, side="right") - 1
        batch = {
            next(iter(self.policy.config.image_features)): to_float(pixels),
            ACTION: torch.from_numpy(self.chunks[frames]),
            "action_is_pad": torch.from_numpy(self.is_pad[frames]).to(device),
            "task": [self.store.instructions[episode] for episode in episodes],
        }
        if self.states is not None:
            batch[OBS_STATE] = torch.from_numpy(self.states[frames])
        return self.preprocessor(batch)


def run(cfg: FinetuneConfig) -> dict:
    """Finetune and return the last training numbers; ValueError where data and pretrained folder do not fit."""
    if cfg.pretrained and cfg.grounding:
        raise ValueError("pretrained and grounding: a pretrained model keeps its own; set pretrain.grounding instead")
    compute = setup(cfg.runtime)
    pretrained = load_config(cfg.pretrained, made_by="pretrain") if cfg.pretrained else None
    image_size = pretrained["image_size"] if pretrained else cfg.image_size
    mixture = open_mixture(cfg.data, cfg.mixture, image_size, cfg.cache_dir, num_episodes=cfg.num_episodes)
    torch.manual_seed(cfg.training.seed)
    robots: list[Robot] = []
    for name in dict.fromkeys(part.embodiment for part in mixture.parts):
        robots.append(build_robot(name, mixture, cfg, pretrained, robots, compute.device))
    trunk = robots[0].policy.model.trunk
    model = nn.ModuleDict({"trunk": trunk, "robots": nn.ModuleList(own_parts(robot.policy) for robot in robots)})
    draw = mixture.sampler(np.arange(mixture.store.num_frames))

    def make_batch(rng: np.random.Generator) -> list[tuple[Robot, dict[str, Any]]]:
        frames = draw(rng, cfg.training.batch_size)[distributed.shard(cfg.training.batch_size)]
        pixels = random_shift(mixture.store.frames[frames], cfg.random_shift_pixels, distributed.own_generator(rng))
        batches = []
        for robot in robots:
            own = frames - robot.first_frame
            is_own = (own >= 0) & (own < robot.store.num_frames)
            if is_own.any():
                batches.append((robot, robot.batch(own[is_own], pixels[is_own], compute.device)))
        return batches

    if compute.compile:
        trunk.compile()
    output_dir = Path(cfg.output_dir)
    inherited = (["trunk."] if pretrained else []) + (["robots.0.action_head."] if robots[0].keeps_head else [])
    if cfg.grounding is not None:
        inherited = ["trunk.text_encoder.", "trunk.image_tokenizer.stem."]
    numbers = fit(
        model,
        make_batch,
        mean_loss,
        cfg.training,
        compute,
        output_dir,
        description="finetune",
        learning_rate_ratios=dict.fromkeys(inherited, cfg.pretrained_learning_rate_ratio),
    )
    if not distributed.is_main():
        return {}
    for robot in robots:
        folder = output_dir / robot.name
        folder.mkdir(exist_ok=True)
        write_json(
            folder / "metrics.json",
            {
                "num_episodes": robot.store.num_episodes,
                "num_frames": robot.store.num_frames,
                "num_instructions_cut": trunk.text_encoder.count_longer(robot.store.instructions),
                "pretrained_on": pretrained["target"] if pretrained else None,
                "kept_action_head": robot.keeps_head,
                "num_parameters": sum(p.numel() for p in robot.policy.parameters()),
                **numbers,
            },
        )
        save_policy(folder, robot.policy, robot.preprocessor, robot.postprocessor)
    finish(output_dir)
    store = mixture.store
    return {"loss": numbers["loss"], "num_episodes": store.num_episodes, "num_frames": store.num_frames}


def build_robot(
    name: str,
    mixture: Mixture,
    cfg: FinetuneConfig,
    pretrained: dict | None,
    others: list[Robot],
    device: torch.device,
) -> Robot:
    """The embodiment `name` of the mixture, which shares the trunk of the others."""
    places = [place for place, part in enumerate(mixture.parts) if part.embodiment == name]
    store = concatenate([mixture.stores[place] for place in places])
    paths = [mixture.parts[place].path for place in places]
    for kind in ("actions", "states") if cfg.use_state else ("actions",):
        known = {path: getattr(mixture.stores[place], kind) for path, place in zip(paths, places, strict=True)}
        sizes = {path: 0 if values is None else values.shape[1] for path, values in known.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"the data sets of embodiment {name!r} have {kind} of other sizes, {sizes}: give each robot an "
                "embodiment of its own in the mixture"
            )
    chunks, is_pad = action_chunks(store, cfg.chunk_size)
    assert store.actions is not None
    if cfg.use_state and store.states is None:
        raise ValueError(f"{paths[0]} has no observation.state: record the robot's state, or set use_state=false")
    states = store.states if cfg.use_state else None
    camera_key = image_key(Path(mixture.parts[places[0]].path).expanduser())
    image_size = store.image_size
    input_features = {camera_key: PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size))}
    if states is not None:
        input_features[OBS_STATE] = PolicyFeature(FeatureType.STATE, (states.shape[1],))
    config = LapaConfig(
        input_features=input_features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (store.actions.shape[1],))},
        device=str(device),
        push_to_hub=False,
        chunk_size=cfg.chunk_size,
        n_action_steps=cfg.num_action_steps,
        image_size=image_size,
        image_tokenizer=pretrained["image_tokenizer"] if pretrained else cfg.image_tokenizer,
        text=pretrained["text"] if pretrained else asdict(cfg.text),
        backbone=pretrained["backbone"] if pretrained else asdict(cfg.backbone),
        action_head=cfg.action_head,
        num_bins=cfg.num_bins,
        num_sampling_steps=cfg.num_sampling_steps,
        use_state=cfg.use_state,
        state_dropout=cfg.state_dropout,
        relative_actions=cfg.relative_actions,
        relative_to=cfg.relative_to,
        optimizer_lr=cfg.training.learning_rate,
        optimizer_weight_decay=cfg.training.weight_decay,
        scheduler_warmup_steps=cfg.training.warmup_steps,
    )
    policy = LapaPolicy(config, trunk=others[0].policy.model.trunk if others else None)
    mean, std = store.actions.mean(0), np.maximum(store.actions.std(0), 1e-6)
    keeps_head = False
    if pretrained and not others:
        # Which of several robots the pretrained head was for is not known: then all heads begin anew.
        is_alone = {part.embodiment for part in mixture.parts} == {name}
        keeps_head = load_pretrained(policy, Path(cfg.pretrained or ""), pretrained, with_head=is_alone)
        if keeps_head:
            mean, std = np.float32(pretrained["action_mean"]), np.float32(pretrained["action_std"])
    elif not others and cfg.grounding is not None:
        start_grounded(policy.model.trunk, cfg.grounding, cfg.text)
    elif not others:
        policy.model.trunk.text_encoder.fit(mixture.store.instructions, cfg.training.seed)
    statistics = {ACTION: {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}}
    if states is not None:
        state_std = states.std(0)
        # A number that never changed keeps its unit: divided by nothing, the least change would be enormous.
        state_std = np.where(state_std > 1e-6, state_std, 1.0).astype(np.float32)
        statistics[OBS_STATE] = {"mean": torch.from_numpy(states.mean(0)), "std": torch.from_numpy(state_std)}
    preprocessor, postprocessor = make_lapa_pre_post_processors(config, statistics)
    targets = torch.from_numpy((store.actions - mean) / std)
    if policy.relative_actions is not None:
        assert states is not None
        origins = states
        if config.reads_last_action:
            begins = np.isin(np.arange(store.num_frames), store.episode_offsets[:-1])
            before = np.roll(store.actions, 1, axis=0)
            origins = np.where(begins[:, None], states, before)
        distances = torch.from_numpy((chunks - origins[:, None]) / std)
        policy.relative_actions.fit(statistics)
        policy.relative_actions.fit_distances(distances, torch.from_numpy(is_pad))
        targets = ((distances - policy.relative_actions.mean) / policy.relative_actions.std)[torch.from_numpy(~is_pad)]
        policy.relative_actions.to(device)
        if config.reads_last_action:
            chunks = np.concatenate([before[:, None], chunks], axis=1)
            is_pad = np.concatenate([begins[:, None], is_pad], axis=1)
    head = policy.model.action_head
    if isinstance(head, BinnedActionHead):
        num_pretrained = head.num_bins_A.clone()
        head.fit_bins(targets)
        if keeps_head and not torch.equal(head.num_bins_A, num_pretrained):
            head.output.reset_parameters()  # with other numbers of bins, a bin is not the rank that was learned
            keeps_head = False
    if isinstance(head, DenoisingActionHead):
        head.fit_limits(targets)
    return Robot(
        name=name,
        store=store,
        first_frame=int(mixture.first_frames[places[0]]),
        chunks=chunks,
        is_pad=is_pad,
        states=states,
        policy=policy,
        preprocessor=preprocessor,
        postprocessor=postprocessor,
        keeps_head=keeps_head,
    )


def own_parts(policy: LapaPolicy) -> nn.ModuleDict:
    """What a policy does not share: all of its model but the trunk."""
    return nn.ModuleDict({name: part for name, part in policy.model.named_children() if name != "trunk"})


def mean_loss(batches: list[tuple[Robot, dict[str, Any]]]) -> tuple[Tensor, dict[str, float]]:
    """Mean over all samples of the loss and of the numbers to log, each robot's rows through its own policy."""
    num_samples = sum(len(batch[ACTION]) for _, batch in batches)
    loss, numbers = torch.zeros((), device=batches[0][1][ACTION].device), dict[str, float]()
    for robot, batch in batches:
        share = len(batch[ACTION]) / num_samples
        own_loss, own_numbers = robot.policy(batch)
        loss = loss + share * own_loss
        for name, value in own_numbers.items():
            numbers[name] = numbers.get(name, 0.0) + share * value
    return loss, numbers


def image_key(data: Path) -> str:
    """The camera's name in the data set: the first one, as `open_frames` reads it."""
    info = data / "meta" / "info.json"
    if not info.is_file():
        return OBS_IMAGE
    features = read_json(info)["features"]
    return next(key for key, feature in features.items() if feature["dtype"] in ("image", "video"))


def load_pretrained(policy: LapaPolicy, folder: Path, pretrained: dict, with_head: bool) -> bool:
    """Load the trunk; and the action head, returning True, where one of the same shape was pretrained."""
    path = folder / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"no {MODEL_FILE} in {folder}: its pretraining has not finished; run it again")
    weights = load_file(path)

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}

    policy.model.trunk.load_state_dict(part("trunk"))
    action_feature = policy.config.action_feature
    assert action_feature is not None
    if policy.relative_actions is not None:
        return False  # what was pretrained predicts positions
    own = policy.config
    wanted: dict = {
        "chunk_size": own.chunk_size,
        "action_head": own.action_head,
        "action_dim": action_feature.shape[0],
    }
    if own.action_head == "bins":
        wanted["num_bins"] = own.num_bins
    offered = {"action_head": "chunk"} | pretrained  # a folder without the name is older than the choice
    if pretrained["target"] != "action" or not with_head or any(offered.get(k) != v for k, v in wanted.items()):
        return False
    policy.model.action_head.load_state_dict(part("action_head"))
    return True


def save_policy(folder: Path, policy: PreTrainedPolicy, preprocessor, postprocessor) -> None:
    """Write the policy folder; config.json last, so that a half-written one does not load."""
    temporary = folder / ".policy.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save_pretrained(temporary)
    preprocessor.save_pretrained(temporary)
    postprocessor.save_pretrained(temporary)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)
    temporary.rmdir()
