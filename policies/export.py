"""Stage `export`: a policy's network as ONNX, for machines without torch (policies/serving/onnx_policy.py runs it).

output_dir/
    model.onnx     images (1, 3, S, S) in [0, 1], word ids (1, W) and, where the policy reads it, the robot's normalised
                   state (1, P) to normalised chunks (1, T, A)
    export.json    names, shapes, what to do to observations before and to actions after, a digest of the policy

The stage runs both on random observations, the whole way from pixels and instruction to actions, and writes nothing
where they differ. Sampled chunks (diffusion, flow), several cameras, models of transformers, and text encoders other
than words are not exported.
"""

import hashlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor, nn

from lapa.checkpoint import MODEL_FILE, write_json
from lapa.latent_vla.heads import DenoisingActionHead
from lapa.schema import ExportConfig
from policies.lapa.modeling_lapa import LapaPolicy
from policies.serving.onnx_policy import EXPORT_FILE, INSTALL, NETWORK_FILE, OnnxPolicy
from policies.serving.served_policy import ServedPolicy

TOLERANCE = 1e-5  # of normalised actions, which are of the order of 1
NUM_CHECKS = 16


class Network(nn.Module):
    """What is exported: images, ids and perhaps states to a normalised chunk."""

    def __init__(self, policy: LapaPolicy):
        super().__init__()
        self.model = policy.model

    def forward(self, images_BCHW: Tensor, ids_BW: Tensor, state_BP: Tensor | None = None) -> Tensor:
        return self.model.decode(images_BCHW, ids_BW, None, state_BP)


def run(cfg: ExportConfig) -> dict:
    """Export, compare, and return the largest difference.

    Raises:
        ValueError: for a policy that cannot be exported, or where the exported one acts differently.
        ImportError: where the extra is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from None
    served = ServedPolicy(cfg.policy, torch.device("cpu"))
    policy = exportable(served, cfg.policy)
    config = policy.config
    size, words = config.image_size, config.text["max_words"]
    network = Network(policy).eval()
    inputs = {"images": torch.zeros(1, 3, size, size), "ids": policy.model.trunk.encode_text(["a few words"])}
    if config.use_state:
        inputs["state"] = torch.zeros(1, *served.inputs[OBS_STATE])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            network,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["chunk"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    output_dir = Path(cfg.output_dir)
    temporary = output_dir / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    onnx.save(program.model_proto, temporary / NETWORK_FILE)
    with torch.inference_mode():
        offset_A, scale_A = line(served.postprocess, served.action_shape[1])
    camera = next(iter(config.image_features))
    description = {
        "policy": served.type,
        "policy_digest": digest(Path(cfg.policy).expanduser()),
        "network_digest": hashlib.sha256((temporary / NETWORK_FILE).read_bytes()).hexdigest(),
        "camera": camera,
        "camera_shape": list(served.inputs[camera]),
        "inputs": {name: [str(tensor.dtype)[6:], list(tensor.shape)] for name, tensor in inputs.items()},
        "outputs": {"chunk": ["float32", [1, *served.action_shape]]},
        "max_words": words,
        "action_scale": scale_A.tolist(),
        "action_offset": offset_A.tolist(),
    }
    if config.use_state:
        offset_P, scale_P = line(lambda state_BP: normalised_state(served, state_BP), *served.inputs[OBS_STATE])
        description |= {"state": OBS_STATE, "state_scale": scale_P.tolist(), "state_offset": offset_P.tolist()}
    write_json(temporary / EXPORT_FILE, description)
    difference = largest_difference(served, OnnxPolicy(temporary))
    for name in (NETWORK_FILE, EXPORT_FILE):
        (temporary / name).replace(output_dir / name)
    temporary.rmdir()
    return {"max_difference": difference, "network_mb": (output_dir / NETWORK_FILE).stat().st_size / 1e6}


def exportable(served: ServedPolicy, folder: str) -> LapaPolicy:
    """The policy inside; ValueError that says why it cannot be exported."""
    policy = served.policy
    if not isinstance(policy, LapaPolicy):
        raise ValueError(f"{folder} is a policy of type {served.type}, expected lapa")
    text, backbone = policy.config.text["name"], policy.config.backbone["name"]
    cameras = list(policy.config.image_features)
    reasons = {
        f"it has several cameras, {cameras}": len(cameras) > 1,
        f"its text encoder is {text}, expected words": text != "words",
        "its actions are relative (relative_actions=true)": policy.config.relative_actions,
        "its backbone is a model of transformers": backbone == "huggingface",
        f"its head samples chunks ({policy.config.action_head})": isinstance(
            policy.model.action_head, DenoisingActionHead
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{folder} cannot be exported: {reason}")
    return policy


def line(normalise: Callable[[Tensor], Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Offset and scale (size,) of a processor that is linear in each number: two points say all of it."""
    offset = normalise(torch.zeros(1, size))[0]
    return offset, normalise(torch.ones(1, size))[0] - offset


def normalised_state(served: ServedPolicy, state_BP: Tensor) -> Tensor:
    """What the policy's preprocessor makes of states."""
    images = {name: torch.zeros(1, *shape) for name, shape in served.inputs.items() if len(shape) == 3}
    return served.preprocess({"task": [""], OBS_STATE: state_BP, **images})[OBS_STATE]


def digest(folder: Path) -> str:
    """SHA-256 over a policy's configuration and weights."""
    found = hashlib.sha256()
    for name in ("config.json", MODEL_FILE):
        found.update((folder / name).read_bytes())
    return found.hexdigest()


def largest_difference(served: ServedPolicy, exported: OnnxPolicy) -> float:
    """Between the two, in normalised actions, over random pictures of several sizes and random instructions.

    ValueError where it is larger than TOLERANCE.
    """
    generator = np.random.default_rng(0)
    vocabulary = ["move", "to", "the", "red", "moon", "push", "blue", "cube", "left", "of", "it"]
    camera, numbers = exported.camera, {name: shape for name, shape in served.inputs.items() if len(shape) == 1}
    _, height, width = exported.inputs[camera]
    largest = 0.0
    for index in range(NUM_CHECKS):
        # The camera's own size, a larger one and one of another shape.
        shape = ((height, width), (2 * height, 2 * width), (height + 16, 2 * width))[index % 3]
        observation = {name: generator.standard_normal(shape, np.float32) for name, shape in numbers.items()} | {
            camera: generator.integers(0, 256, (*shape, 3), dtype=np.uint8),
            "task": " ".join(generator.choice(vocabulary, generator.integers(1, 2 + exported.max_words))),
        }
        difference = np.abs(served.infer(observation) - exported.infer(observation)) / np.abs(exported.scale_A)
        largest = max(largest, float(difference.max()))
    if not largest <= TOLERANCE:
        raise ValueError(f"the exported network differs by {largest:.2g} from the policy, allowed are {TOLERANCE}")
    return largest
