"""Training by LeRobot's parts and by `lapa finetune` is the same training; LoRA and the hub work on its policies."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies import pretrained as lerobot_pretrained
from lerobot.policies.factory import make_policy, make_pre_post_processors
from torch.utils.data import default_collate

from envs import demos
from lapa.schema import DemosConfig, FinetuneConfig, Runtime, Training, WordText
from policies import finetune
from policies.lapa.modeling_lapa import LapaPolicy
from tests.lapa.latent_vla.test_pretrain import BACKBONE
from tests.policies.test_lapa_policy import new_policy, observation, training_batch

NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 4, 8, 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demos")
    demos.run(DemosConfig(output_dir=str(folder), num_episodes=3, image_size=32, num_workers=1, video=False))
    return folder / "demos"


FROM_THE_LAST_ACTION = {"use_state": True, "relative_actions": True, "relative_to": "last_action"}


@pytest.mark.parametrize("options", [{}, FROM_THE_LAST_ACTION])
def test_lapa_finetune_and_lerobots_parts_train_the_same_policy(data, tmp_path, monkeypatch, options):
    """The same start, data set and frames: the same batches, losses and, after some steps, weights.

    lerobot_train itself takes minutes to import on a small machine; this does what its loop does, with the same parts:
    LeRobotDataset, make_policy, make_pre_post_processors, the policy's own optimiser preset, clipping.
    """
    start: dict[str, torch.Tensor] = {}
    losses: list[float] = []
    build_robot, mean_loss = finetune.build_robot, finetune.mean_loss

    def watched_robot(*arguments):
        robot = build_robot(*arguments)
        start.update({name: value.clone() for name, value in robot.policy.state_dict().items()})
        return robot

    def watched_loss(batches):
        loss, numbers = mean_loss(batches)
        losses.append(loss.item())
        return loss, numbers

    monkeypatch.setattr(finetune, "build_robot", watched_robot)
    monkeypatch.setattr(finetune, "mean_loss", watched_loss)
    finetune.run(
        FinetuneConfig(
            output_dir=str(tmp_path / "policy"),
            data=str(data),
            backbone=BACKBONE,
            text=WordText(),
            image_size=32,
            random_shift_pixels=0,  # LeRobot shifts nothing
            chunk_size=3,
            **options,
            training=Training(
                num_steps=NUM_STEPS,
                batch_size=BATCH_SIZE,
                learning_rate=LEARNING_RATE,
                warmup_steps=0,
                final_learning_rate_ratio=1.0,
                tensorboard=False,
            ),
            runtime=Runtime(device="cpu", dtype="float32", num_threads=1),
        )
    )
    ours = LapaPolicy.from_pretrained(tmp_path / "policy")

    config = ours.config
    config.pretrained_path = None
    source = LeRobotDataset("demos", root=data, video_backend="pyav")
    stamps = resolve_delta_timestamps(config, source.meta)
    dataset = LeRobotDataset("demos", root=data, video_backend="pyav", delta_timestamps=stamps)
    theirs = make_policy(config, ds_meta=dataset.meta)
    theirs.load_state_dict(start)
    preprocessor, _ = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    optimizer = config.get_optimizer_preset().build(theirs.get_optim_params())
    theirs.train()
    found = []
    for step in range(NUM_STEPS):
        frames = np.random.default_rng([0, step]).choice(len(dataset), BATCH_SIZE)
        batch = preprocessor(default_collate([dataset[int(frame)] for frame in frames]))
        loss, _ = theirs.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.get_optimizer_preset().grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found == pytest.approx(losses, rel=1e-4)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, atol=2e-4, rtol=1e-3, msg=name)
    moved = max((value - start[name]).abs().max().item() for name, value in ours.state_dict().items())
    assert moved > 2e-3, "training moved nothing, so the comparison says nothing"


def saved(folder: Path, policy: LapaPolicy) -> Path:
    policy.save_pretrained(folder)
    return folder


def test_lora_on_a_saved_policy_trains_adapters_only_and_loads_again(tmp_path):
    pytest.importorskip("peft")
    base = saved(tmp_path / "base", new_policy())
    policy = LapaPolicy.from_pretrained(base)
    policy.config.pretrained_path = str(base)
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 4})
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name or "action_head" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    batch = training_batch()
    for _ in range(3):
        loss, _ = wrapped.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wrapped.eval()
    expected = wrapped.predict_action_chunk(observation())
    assert not torch.allclose(expected, LapaPolicy.from_pretrained(base).predict_action_chunk(observation()))
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.config.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    again = PeftModel.from_pretrained(LapaPolicy.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(again.predict_action_chunk(observation()), expected)


class FolderHub:
    """What LeRobot asks of the hub, with a folder in its place."""

    def __init__(self, root: Path):
        self.root = root

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> SimpleNamespace:
        for file in Path(folder_path).iterdir():
            (self.root / repo_id / file.name).write_bytes(file.read_bytes())
        return SimpleNamespace(repo_url=SimpleNamespace(url=f"folder:{repo_id}"))

    def download(self, repo_id: str, filename: str, **_: Any) -> str:
        return str(self.root / repo_id / filename)


def test_a_policy_pushed_to_the_hub_is_pulled_as_it_was(tmp_path, monkeypatch):
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(lerobot_pretrained, "HfApi", lambda: hub)
    # A model card needs a template from the net to be checked.
    monkeypatch.setattr(
        LapaPolicy, "generate_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: Path(path).touch())
    )
    policy = new_policy(repo_id="someone/policy", push_to_hub=True)
    cfg = TrainPipelineConfig(dataset=DatasetConfig(repo_id="someone/data"), policy=policy.config)
    policy.push_model_to_hub(cfg)
    assert {"config.json", "model.safetensors"} <= {file.name for file in (hub.root / "someone" / "policy").iterdir()}
    from lerobot.configs import policies as lerobot_policies

    for module in (lerobot_pretrained, lerobot_policies):
        monkeypatch.setattr(module, "hf_hub_download", hub.download)
    pulled = LapaPolicy.from_pretrained("someone/policy")
    torch.testing.assert_close(pulled.predict_action_chunk(observation()), policy.predict_action_chunk(observation()))
