"""Stage `finetune_unipi`: a pretrained planner sees the demonstrations, and with an inverse model becomes a policy.

The planner goes on to denoise the frame a gap ahead; the inverse model stays as `lapa train_inverse` left it. Writes a
LeRobot policy folder (`policy.type=unipi`), log.jsonl and metrics.json.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION

from lapa import distributed
from lapa.checkpoint import load_config, load_weights, write_json
from lapa.data import FramePairs, open_frames, to_float
from lapa.quantizer.train_inverse import require_rate, shift_pairs
from lapa.runtime import setup
from lapa.schema import FinetuneUnipiConfig
from lapa.trainer import finish, fit
from policies.finetune import image_key, save_policy
from policies.unipi.configuration_unipi import UnipiConfig
from policies.unipi.modeling_unipi import UnipiPolicy
from policies.unipi.processor_unipi import make_unipi_pre_post_processors


def run(cfg: FinetuneUnipiConfig) -> dict:
    """Finetune and return the last training numbers; ValueError where the folders do not fit together."""
    compute = setup(cfg.runtime)
    pretrained = load_config(cfg.pretrained, made_by="pretrain")
    if pretrained["target"] != "frame":
        raise ValueError(
            f"{cfg.pretrained} was pretrained with predict={pretrained['target']}: UniPi needs predict=frame"
        )
    inverse = load_config(cfg.inverse, made_by="train_inverse")
    size = pretrained["image_size"]
    if inverse["image_size"] != size:
        raise ValueError(f"the planner sees {size} px, the inverse model in {cfg.inverse} {inverse['image_size']} px")
    store = open_frames(cfg.data, size, cfg.cache_dir)
    require_rate(store, inverse)
    # On the robot's own clock, whatever gap the videos had: the plan lies where the inverse model looks.
    gap = inverse["frame_gap_frames"]
    pairs = FramePairs(store, gap, np.arange(store.num_episodes))

    camera_key = image_key(Path(cfg.data).expanduser())
    config = UnipiConfig(
        input_features={camera_key: PolicyFeature(FeatureType.VISUAL, (3, size, size))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (inverse["action_dim"],))},
        device=str(compute.device),
        push_to_hub=False,
        frame_gap_frames=gap,
        n_action_steps=cfg.num_action_steps,
        image_size=size,
        image_tokenizer=pretrained["image_tokenizer"],
        text=pretrained["text"],
        backbone=pretrained["backbone"],
        future_frame=pretrained["future_frame"]
        | {"num_sampling_steps": cfg.num_sampling_steps, "guidance": cfg.guidance},
        inverse_width=inverse["width"],
        num_keypoints=inverse["num_keypoints"],
        optimizer_lr=cfg.training.learning_rate,
        optimizer_weight_decay=cfg.training.weight_decay,
        scheduler_warmup_steps=cfg.training.warmup_steps,
    )
    torch.manual_seed(cfg.training.seed)
    policy = UnipiPolicy(config)
    load_weights(cfg.pretrained, policy.planner)
    load_weights(cfg.inverse, policy.inverse)
    statistics = {ACTION: {"mean": policy.inverse.mean_A.clone(), "std": policy.inverse.std_A.clone()}}
    preprocessor, postprocessor = make_unipi_pre_post_processors(config, statistics)
    episode_of_frame = store.episode_of_frame()

    def make_batch(rng: np.random.Generator) -> dict[str, Any]:
        batch_size = cfg.training.batch_size
        indices = rng.integers(len(pairs), size=batch_size)[distributed.shard(batch_size)]
        frames = shift_pairs(pairs.frames(indices), cfg.random_shift_pixels, distributed.own_generator(rng))
        tasks = [store.instructions[episode] for episode in episode_of_frame[pairs.first_frames[indices]]]
        return {camera_key: to_float(frames, compute.device), "task": tasks}

    output_dir = Path(cfg.output_dir)
    numbers = fit(
        policy,
        make_batch,
        lambda batch: policy(batch),
        cfg.training,
        compute,
        output_dir,
        description="finetune planner",
        learning_rate_ratios={"planner.": cfg.pretrained_learning_rate_ratio},
    )
    if not distributed.is_main():
        return {}
    result = {"loss": numbers["loss"], "num_episodes": store.num_episodes, "num_pairs": len(pairs)}
    num_parameters = sum(parameter.numel() for parameter in policy.parameters())
    write_json(output_dir / "metrics.json", numbers | result | {"num_parameters": num_parameters})
    save_policy(output_dir, policy, preprocessor, postprocessor)
    finish(output_dir)
    return result
