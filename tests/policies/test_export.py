"""The exported policy acts as the policy does, without torch, and behind the server."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lerobot.configs import FeatureType, PolicyFeature

from lapa.schema import ByteText, ExportConfig
from policies import export
from policies.finetune import save_policy
from policies.lapa.processor_lapa import make_lapa_pre_post_processors
from policies.serving.onnx_policy import OnnxPolicy, resize
from policies.serving.served_policy import ServedPolicy
from tests.policies.test_lapa_policy import STATISTICS, new_policy, small_config

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
CAMERA, STATE = "observation.images.top", "observation.state"
RELATIVE = {
    "input_features": small_config().input_features | {STATE: PolicyFeature(FeatureType.STATE, (2,))},
    "use_state": True,
    "relative_actions": True,
}


def saved(folder, policy):
    folder.mkdir()
    state = {STATE: {"mean": torch.tensor([0.1, 0.2, 0.3]), "std": torch.tensor([1.0, 2.0, 0.5])}}
    save_policy(folder, policy, *make_lapa_pre_post_processors(policy.config, STATISTICS | state))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy of binned actions and with a state (the one with most to get wrong), and its export."""
    root = tmp_path_factory.mktemp("export")
    features = small_config().input_features | {STATE: PolicyFeature(FeatureType.STATE, (3,))}
    policy = new_policy(action_head="bins", num_bins=8, input_features=features, use_state=True)
    for block in policy.model.trunk.backbone.blocks:
        # Random attention is an average of all tokens, in which the state hardly changes the largest logit: sharpen it.
        torch.nn.init.constant_(block.attention.query_norm.weight, 10.0)
        torch.nn.init.normal_(block.attention.output.weight)
    torch.nn.init.normal_(policy.model.state_token.projection.weight)
    policy.model.action_head.fit_bins(torch.randn(100, 2, generator=torch.Generator().manual_seed(0)))
    folder, exported = saved(root / "policy", policy), root / "exported"
    exported.mkdir()
    found = export.run(ExportConfig(str(exported), folder))
    assert found["max_difference"] <= 1e-5
    return folder, exported


def test_it_acts_as_the_policy_does(folders):
    served, exported = ServedPolicy(folders[0], torch.device("cpu")), OnnxPolicy(folders[1])
    assert exported.inputs == served.inputs and exported.action_shape == served.action_shape
    generator = np.random.default_rng(1)
    for size, task in [(32, "go to the red moon"), (50, ""), (32, "word " * 40)]:
        seen = {CAMERA: generator.integers(0, 256, (size, size, 3), dtype=np.uint8), "task": task}
        seen[STATE] = generator.standard_normal(3, np.float32)
        assert np.allclose(exported.infer(seen), served.infer(seen), atol=1e-5)
    states = 10 * generator.standard_normal((30, 3), np.float32)
    chunks = [exported.infer(seen | {STATE: state}) for state in states]
    assert not all(np.allclose(chunks[0], chunk, atol=1e-3) for chunk in chunks), "the state is read"


def test_a_network_that_differs_is_not_let_through(folders, monkeypatch):
    served, exported = ServedPolicy(folders[0], torch.device("cpu")), OnnxPolicy(folders[1])
    infer = exported.infer
    monkeypatch.setattr(exported, "infer", lambda observation: infer(observation) + 1e-4)
    with pytest.raises(ValueError, match="differs by"):
        export.largest_difference(served, exported)


def test_the_description_says_which_policy_it_is_of(folders):
    description = json.loads((folders[1] / "export.json").read_text())
    assert description["policy_digest"] == export.digest(export.Path(folders[0]))
    assert description["inputs"]["images"] == ["float32", [1, 3, 32, 32]]
    with pytest.raises(ValueError, match="written by `lapa export`"):
        OnnxPolicy(folders[0])


def test_it_runs_without_torch(folders):
    code = f"""
import sys, numpy as np
from policies.serving.onnx_policy import OnnxPolicy
seen = {{{CAMERA!r}: np.zeros((40, 30, 3), np.uint8), {STATE!r}: np.zeros(3, np.float32), "task": "go"}}
actions = OnnxPolicy({str(folders[1])!r}).infer(seen)
sys.exit("torch" in sys.modules or actions.shape != (3, 2))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("shape", [(64, 64), (48, 100), (20, 20), (33, 31)])
def test_images_are_resized_as_torch_does(shape):
    image = np.random.default_rng(0).random((*shape, 3)).astype(np.float32)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    wanted = F.interpolate(tensor, (32, 32), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert np.allclose(resize(image, 32), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (RELATIVE, "actions are relative"),
        ({"action_head": "flow"}, "samples chunks"),
        ({"text": asdict(ByteText())}, "text encoder is bytes"),
    ],
)
def test_what_cannot_be_exported_is_said(tmp_path, changes, reason):
    folder = saved(tmp_path / "policy", new_policy(**changes))
    with pytest.raises(ValueError, match=reason):
        export.run(ExportConfig(str(tmp_path), folder))
