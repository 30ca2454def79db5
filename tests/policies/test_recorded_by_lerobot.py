"""What lerobot-rollout records on the simulated robot is data that `lapa finetune` and `lapa preflight` read."""

import sys
import threading

from lerobot.configs import PreTrainedConfig
from lerobot.configs.dataset import DatasetRecordConfig
from lerobot.configs.video import RGBEncoderConfig

import lerobot_policy_lapa  # noqa: F401  registers policy and robots
from envs.config_simulated_tabletop import SimulatedTabletopConfig
from lapa.checkpoint import read_json
from lapa.schema import FinetuneConfig, PreflightConfig, Runtime, Training, WordText
from policies import finetune
from policies.lapa.processor_lapa import make_lapa_pre_post_processors
from policies.preflight import preflight
from tests.lapa.latent_vla.test_pretrain import BACKBONE
from tests.policies.test_lapa_policy import STATISTICS, new_policy

FPS = 10
RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)


def test_recorded_rollouts_are_finetuned_on(tmp_path, monkeypatch):
    from lerobot.rollout import RolloutConfig, build_rollout_context, create_strategy
    from lerobot.rollout.configs import EpisodicStrategyConfig

    monkeypatch.setattr(sys, "argv", ["lerobot-rollout"])
    policy = new_policy()
    (tmp_path / "policy").mkdir()
    finetune.save_policy(tmp_path / "policy", policy, *make_lapa_pre_post_processors(policy.config, STATISTICS))
    config = PreTrainedConfig.from_pretrained(tmp_path / "policy")
    config.pretrained_path = str(tmp_path / "policy")
    recorded = tmp_path / "recorded"
    cfg = RolloutConfig(
        robot=SimulatedTabletopConfig(id="sim", calibration_dir=tmp_path, image_size=32),
        policy=config,
        strategy=EpisodicStrategyConfig(reset_to_initial_position=False),
        dataset=DatasetRecordConfig(
            repo_id="someone/rollout_sim",
            root=recorded,
            single_task="go to the red moon",
            fps=FPS,
            num_episodes=2,
            episode_time_s=2,
            reset_time_s=0,
            push_to_hub=False,
            no_stamp=True,
            rgb_encoder=RGBEncoderConfig(vcodec="h264"),
        ),
        fps=FPS,
        task="go to the red moon",
        play_sounds=False,
        return_to_initial_position=False,
    )
    context = build_rollout_context(cfg, threading.Event())
    strategy = create_strategy(cfg.strategy)
    try:
        strategy.setup(context)
        strategy.run(context)
    finally:
        strategy.teardown(context)
    assert read_json(recorded / "meta" / "info.json")["total_episodes"] == 2

    results = finetune.run(
        FinetuneConfig(
            output_dir=str(tmp_path / "again"),
            data=str(recorded),
            backbone=BACKBONE,
            text=WordText(),
            image_size=32,
            random_shift_pixels=1,
            chunk_size=3,
            training=Training(num_steps=2, batch_size=8, warmup_steps=1, tensorboard=False),
            runtime=RUNTIME,
        )
    )
    assert results["num_episodes"] == 2
    found = preflight.run(
        PreflightConfig(
            output_dir=str(tmp_path / "preflight"),
            data=str(recorded),
            policy=str(tmp_path / "again"),
            checks=["features", "timing"],
            runtime=RUNTIME,
        )
    )
    assert found["num_fail"] == 0
