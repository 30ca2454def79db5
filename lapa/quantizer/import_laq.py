"""`lapa import_laq`: the released quantizer's weights (`laq_openx.pt`) become a quantizer folder.

The file is a state dict that `torch.save` wrote. It is read without running code, every size is told by a tensor's
shape, and the names and shapes must be exactly those of the architecture (`laq.py`).
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lapa.checkpoint import save_model
from lapa.quantizer.laq import CODES, COMPRESSIONS, LAQ, RELEASED_CODES, from_released
from lapa.schema import ImportLAQConfig, LAQQuantizer, SharedNSVQCodebook

SHOWN = 5  # names in an error


def run(cfg: ImportLAQConfig) -> dict:
    """Check and convert the weights; returns how many numbers they have and what was told by their shapes."""
    path = Path(cfg.path).expanduser()
    if cfg.frame_gap_s <= 0:
        raise ValueError(f"frame_gap_s is {cfg.frame_gap_s}: expected seconds above 0")
    state = from_released(read_state(path))
    model, codebook = infer_sizes(state, cfg.image_size, path)
    require_exact(state, expected_shapes(model, codebook), path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = {
        "model": asdict(model),
        "codebook": asdict(codebook),
        "image_size": model.image_size,
        # The frame rate of the training data is not known: labelling turns seconds into frames of its own data.
        "frame_gap_frames": None,
        "frame_gap_s": cfg.frame_gap_s,
        "fps": None,
        "data_fingerprint": None,
        "holdout_episodes": None,
        "imported_from": {"file": path.name, "sha256": digest},
    }
    save_model(Path(cfg.output_dir), {name: tensor.float() for name, tensor in state.items()}, config)
    print(
        f"next: lapa evaluate_quantizer quantizer={cfg.output_dir} data=... output_dir=... measures these codes on "
        f"frames of {model.image_size} px, and lapa label evaluation=... takes the gate from there. "
        "runtime.dtype=float32 gives exactly the released codes"
    )
    return {
        "num_elements": sum(tensor.numel() for tensor in state.values()),
        "width": model.width,
        "num_layers": model.num_spatial_layers + model.num_temporal_layers + model.num_decoder_layers,
        "code_length": codebook.code_length,
        "codebook_size": codebook.codebook_size,
    }


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, memory-mapped where its format allows.

    Raises ValueError for a file that is missing, is no such file, would run code, or holds anything but tensors.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}: expected the released quantizer's laq_openx.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is no plain file of tensors and was not loaded, since it could run code ({reason}): "
            "expected a state dict as torch.save writes it"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}): download it again") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}: expected a dict of tensors by name")
    others = [f"{name}: {type(v).__name__}" for name, v in state.items() if not torch.is_tensor(v)]
    if others or not state:
        found = ", ".join(others[:SHOWN]) or "nothing"
        raise ValueError(
            f"{path} holds {found}: expected a dict of tensors by name and nothing else. From a training "
            'checkpoint, save its state dict alone: torch.save(checkpoint["model"], ...)'
        )
    return dict(state)


def infer_sizes(state: Mapping[str, Tensor], image_size: int, path: Path) -> tuple[LAQQuantizer, SharedNSVQCodebook]:
    """The architecture that shapes of tensors tell; only the image size is not among them."""
    attention = "enc_spatial_transformer.layers.0.1"
    needed = {
        "to_patch_emb_first_frame.2.weight": 2,
        f"{attention}.null_kv": 3,
        CODES: 2,
        "vq.cnn_encoder.0.weight": 4,
    }
    wrong = [name for name, ndim in needed.items() if name not in state or state[name].ndim != ndim]
    if wrong:
        wrong = [RELEASED_CODES if name == CODES else name for name in wrong]
        raise ValueError(
            f"{path} is no released quantizer: it lacks {', '.join(wrong)}, or holds another shape there, and has "
            f"{len(state)} tensors such as {', '.join(list(state)[:SHOWN])}; expected 493 at full size"
        )
    width, numbers = state["to_patch_emb_first_frame.2.weight"].shape
    patch_size = max(1, round((numbers / 3) ** 0.5))
    num_heads, _, head_width = state[f"{attention}.null_kv"].shape
    codebook_size, latent_dim = state[CODES].shape
    model = LAQQuantizer(
        image_size=image_size,
        latent_dim=latent_dim,
        patch_size=patch_size,
        width=width,
        num_heads=num_heads,
        head_width=head_width,
        num_spatial_layers=num_layers(state, "enc_spatial_transformer"),
        num_temporal_layers=num_layers(state, "enc_temporal_transformer"),
        num_decoder_layers=num_layers(state, "dec_spatial_transformer"),
    )
    code_length = infer_code_length(state, image_size // patch_size, path)
    return model, SharedNSVQCodebook(code_length=code_length, codebook_size=codebook_size)


def num_layers(state: Mapping[str, Tensor], transformer: str) -> int:
    matches = (re.match(rf"{transformer}\.layers\.(\d+)\.", name) for name in state)
    return len({match[1] for match in matches if match})


def infer_code_length(state: Mapping[str, Tensor], grid: int, path: Path) -> int:
    """Tokens of a latent action, from the second convolution's kernel and the number of patches along a side."""
    second = state.get("vq.cnn_encoder.2.weight")
    kernel = None if second is None else tuple(second.shape[2:])
    fitting = {}
    for code_length, (side, convolution) in COMPRESSIONS.items():
        size = convolution[0] if convolution else None
        if kernel == ((size, size) if isinstance(size, int) else size):
            fitting[side] = code_length
    if grid not in fitting:
        raise ValueError(
            f"{path} has a second convolution of kernel {kernel}, which takes {sorted(fitting)} patches along a "
            f"side, and image_size gives {grid}: set image_size to that many times the patch size"
        )
    return fitting[grid]


def expected_shapes(model: LAQQuantizer, codebook: SharedNSVQCodebook) -> dict[str, tuple[int, ...]]:
    """Every tensor of the architecture by name, without memory for it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in LAQ(model, codebook).state_dict().items()}


def require_exact(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise ValueError that names what is missing, what is unexpected and what has another shape."""
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in state]
    unexpected = [f"{name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in expected]
    other = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    other += [f"{name} is {t.dtype}, expected a float type" for name, t in state.items() if not t.is_floating_point()]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape or type": other}
    if any(problems.values()):
        lines = "".join(
            f"\n  {len(names)} {what}: {'; '.join(names[:SHOWN])}{'; ...' if len(names) > SHOWN else ''}"
            for what, names in problems.items()
            if names
        )
        raise ValueError(f"{path} does not fit the released architecture ({len(expected)} tensors expected):{lines}")
