"""Stage `finetune`: a few demonstrations turn a pretrained trunk, or random weights, into a LeRobot policy.

The latent head is dropped and an action head takes its place (arXiv 2410.11758). A trunk pretrained on true
actions keeps its head and its action statistics where they fit: with action_head=chunk, at the same chunk size. Bins
and denoising heads are made of other weights than the linear head of pretraining, and begin anew.

Writes the policy folder (config.json, model.safetensors, policy_preprocessor.json, policy_postprocessor.json
and their state), log.jsonl and metrics.json.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE
from safetensors.torch import load_file
from torch import Tensor

from lapa import distributed
from lapa.checkpoint import MODEL_FILE, load_config, read_json, write_json
from lapa.data import action_chunks, open_frames, to_float
from lapa.latent_vla.heads import BinnedActionHead, DenoisingActionHead
from lapa.latent_vla.vision import random_shift
from lapa.runtime import setup
from lapa.schema import FinetuneConfig
from lapa.trainer import finish, fit
from policies.lapa.configuration_lapa import LapaConfig
from policies.lapa.modeling_lapa import LapaPolicy
from policies.lapa.processor_lapa import make_lapa_pre_post_processors


def run(cfg: FinetuneConfig) -> dict:
    """Finetune and return the last training numbers; ValueError where data and pretrained folder do not fit."""
    compute = setup(cfg.runtime)
    pretrained = load_config(cfg.pretrained, made_by="pretrain") if cfg.pretrained else None
    image_size = pretrained["image_size"] if pretrained else cfg.image_size
    store = open_frames(cfg.data, image_size, cfg.cache_dir)
    num_episodes = store.num_episodes if cfg.num_episodes is None else cfg.num_episodes
    if not 1 <= num_episodes <= store.num_episodes:
        raise ValueError(f"num_episodes is {num_episodes}, {cfg.data} has {store.num_episodes}")
    num_frames = int(store.episode_offsets[num_episodes])
    chunks, is_pad = action_chunks(store, cfg.chunk_size)
    chunks, is_pad = chunks[:num_frames], is_pad[:num_frames]
    assert store.actions is not None
    demo_actions = store.actions[:num_frames]
    if cfg.use_state and store.states is None:
        raise ValueError(f"{cfg.data} has no observation.state: record the robot's state, or set use_state=false")
    states = store.states[:num_frames] if cfg.use_state and store.states is not None else None

    camera_key = image_key(Path(cfg.data).expanduser())
    input_features = {camera_key: PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size))}
    if states is not None:
        input_features[OBS_STATE] = PolicyFeature(FeatureType.STATE, (states.shape[1],))
    config = LapaConfig(
        input_features=input_features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (demo_actions.shape[1],))},
        device=str(compute.device),
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
        optimizer_lr=cfg.training.learning_rate,
        optimizer_weight_decay=cfg.training.weight_decay,
        scheduler_warmup_steps=cfg.training.warmup_steps,
    )
    torch.manual_seed(cfg.training.seed)
    policy = LapaPolicy(config)
    mean, std = demo_actions.mean(0), np.maximum(demo_actions.std(0), 1e-6)
    keeps_head = False
    if pretrained:
        keeps_head = load_pretrained(policy, Path(cfg.pretrained or ""), pretrained)
        if keeps_head:
            mean, std = np.float32(pretrained["action_mean"]), np.float32(pretrained["action_std"])
    else:
        policy.model.trunk.text_encoder.fit(store.instructions[:num_episodes], cfg.training.seed)
    statistics = {ACTION: {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}}
    if states is not None:
        state_std = states.std(0)
        # A number that never changed keeps its unit: divided by nothing, the least change would be enormous.
        state_std = np.where(state_std > 1e-6, state_std, 1.0).astype(np.float32)
        statistics[OBS_STATE] = {"mean": torch.from_numpy(states.mean(0)), "std": torch.from_numpy(state_std)}
    preprocessor, postprocessor = make_lapa_pre_post_processors(config, statistics)
    head = policy.model.action_head
    if isinstance(head, BinnedActionHead):
        head.fit_bins(torch.from_numpy((demo_actions - mean) / std))
    if isinstance(head, DenoisingActionHead):
        head.fit_limits(torch.from_numpy((demo_actions - mean) / std))

    episode_of_frame = store.episode_of_frame()

    def make_batch(rng: np.random.Generator) -> dict[str, Any]:
        frames = rng.choice(num_frames, cfg.training.batch_size)[distributed.shard(cfg.training.batch_size)]
        pixels = random_shift(store.frames[frames], cfg.random_shift_pixels, distributed.own_generator(rng))
        batch = {
            camera_key: to_float(pixels),
            ACTION: torch.from_numpy(chunks[frames]),
            "action_is_pad": torch.from_numpy(is_pad[frames]).to(compute.device),
            "task": [store.instructions[episode] for episode in episode_of_frame[frames]],
        }
        if states is not None:
            batch[OBS_STATE] = torch.from_numpy(states[frames])
        return preprocessor(batch)

    if compute.compile:
        policy.model.trunk.compile()
    output_dir = Path(cfg.output_dir)
    inherited = (["model.trunk."] if pretrained else []) + (["model.action_head."] if keeps_head else [])
    numbers = fit(
        policy,
        make_batch,
        lambda batch: policy(batch),
        cfg.training,
        compute,
        output_dir,
        description="finetune",
        learning_rate_ratios=dict.fromkeys(inherited, cfg.pretrained_learning_rate_ratio),
    )
    if not distributed.is_main():
        return {}
    write_json(
        output_dir / "metrics.json",
        {
            "num_episodes": num_episodes,
            "num_frames": num_frames,
            "num_instructions_cut": policy.model.trunk.text_encoder.count_longer(store.instructions[:num_episodes]),
            "pretrained_on": pretrained["target"] if pretrained else None,
            "kept_action_head": keeps_head,
            "num_parameters": sum(p.numel() for p in policy.parameters()),
            **numbers,
        },
    )
    save_policy(output_dir, policy, preprocessor, postprocessor)
    finish(output_dir)
    return {"loss": numbers["loss"], "num_episodes": num_episodes, "num_frames": num_frames}


def image_key(data: Path) -> str:
    """The camera's name in the data set: the first one, as `open_frames` reads it."""
    info = data / "meta" / "info.json"
    if not info.is_file():
        return OBS_IMAGE
    features = read_json(info)["features"]
    return next(key for key, feature in features.items() if feature["dtype"] in ("image", "video"))


def load_pretrained(policy: LapaPolicy, folder: Path, pretrained: dict) -> bool:
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
    wanted = ("action", "chunk", policy.config.chunk_size, action_feature.shape[0])
    offered = (
        pretrained["target"],
        policy.config.action_head,
        pretrained.get("chunk_size"),
        pretrained.get("action_dim"),
    )
    if wanted != offered:
        return False
    policy.model.action_head.load_state_dict(part("action_head"))
    return True


def save_policy(folder: Path, policy: LapaPolicy, preprocessor, postprocessor) -> None:
    """Write the policy folder; config.json last, so that a half-written one does not load."""
    temporary = folder / ".policy.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save_pretrained(temporary)
    preprocessor.save_pretrained(temporary)
    postprocessor.save_pretrained(temporary)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)
    temporary.rmdir()
