"""Upcycling: experts that begin as copies of a trained feed-forward (arXiv 2212.05055; MoMa, 2407.21770 section 2.5).

The source is a dense transformer, or MoMa with one expert a group, which is the better one: its experts are used to
their modality. Attention and norms are taken over, routers are new. What is equal afterwards:

    a group with one expert          all of it: there is no router, the hidden states are the source's
    a group with several             the output of a token that one expert took, where the new router is undecided.
                                     Its weight is about 1/2 then, so the copies' outputs are doubled

A token that several experts took, or none, differs from the source; training goes on from there, with a learning-rate
schedule of its own.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lapa import schema
from lapa.backbones.base import build_backbone
from lapa.backbones.moma import expert_groups
from lapa.checkpoint import MODEL_FILE, load_config
from lapa.schema import DenseBackbone, MoMaBackbone

BACKBONE_PREFIX = "trunk.backbone."


def initial_state(folder: str | Path, config: schema.Backbone, seed: int) -> dict[str, Tensor]:
    """The weights of a folder of `lapa pretrain`, for the same model with the backbone `config`.

    They are unchanged where the backbone is that of the folder, and upcycled where it is MoMa.
    ValueError where neither is possible.
    """
    source = schema.from_dict("backbone", load_config(folder, made_by="pretrain")["backbone"])
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"no {MODEL_FILE} in {folder}: the pretraining there has not finished; run it again")
    state = load_file(path)
    if source == config:
        return state
    backbone = {k.removeprefix(BACKBONE_PREFIX): v for k, v in state.items() if k.startswith(BACKBONE_PREFIX)}
    rest = {k: v for k, v in state.items() if not k.startswith(BACKBONE_PREFIX)}
    return rest | {BACKBONE_PREFIX + k: v for k, v in upcycle(backbone, source, config, seed).items()}


def upcycle(state: dict[str, Tensor], source: schema.Backbone, config: schema.Backbone, seed: int) -> dict[str, Tensor]:
    """The state of a MoMa backbone `config`, from that of a trained dense one or of one expert a group.

    Args:
        state: of the source backbone.
        seed: of the new routers.

    Raises ValueError where the source is something else, or of another size.
    """
    if not isinstance(config, MoMaBackbone):
        raise ValueError(f"backbone is {config.name!r}, the weights are of {source.name!r}: only moma can be upcycled")
    is_dense = type(source) is DenseBackbone
    if not is_dense and not (isinstance(source, MoMaBackbone) and set(source.num_experts) == {1}):
        described = source.num_experts if isinstance(source, MoMaBackbone) else "none"
        raise ValueError(
            f"the weights to upcycle are of {source.name!r} with num_experts {described}: "
            "expected a dense backbone, or moma with one expert a group"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_backbone(config).state_dict()
    # Mixture-of-depths wraps a block: the same weights, one name further down.
    trained = {plain_name(name): tensor for name, tensor in state.items()}
    new: dict[str, Tensor] = {}
    missing: list[str] = []
    for name, tensor in fresh.items():
        found = tensor if "router" in name or "auxiliary" in name else None
        if ".experts." in name:
            before, group, part = plain_name(name).rsplit(".", 2)
            found = copies(trained, before.removesuffix(".experts"), part, int(group), source, config)
        elif plain_name(name) in trained:
            found = trained[plain_name(name)]
        if found is None or found.shape != tensor.shape:
            missing.append(f"{name} {tuple(tensor.shape)}, found {None if found is None else tuple(found.shape)}")
        else:
            new[name] = found.to(tensor.dtype).clone()
    if missing:
        raise ValueError(
            f"the weights to upcycle do not fit the backbone: expected {'; '.join(missing[:3])}: "
            "choose the same width, num_layers, heads and feed_forward_ratio"
        )
    return new


def copies(
    trained: dict[str, Tensor], layer: str, part: str, group: int, source: schema.Backbone, config: MoMaBackbone
) -> Tensor | None:
    """`gate_up` (E, D, 2 F) or `down` (E, F, D) of a group's experts; None if the source lacks the weights."""
    if isinstance(source, MoMaBackbone):
        source_groups, modalities = expert_groups(source), set(expert_groups(config)[group])
        matching = [index for index, others in enumerate(source_groups) if modalities <= set(others)]
        if not matching:
            raise ValueError(
                f"backbone.groups is {config.groups}, of the weights to upcycle {source.groups}: "
                "every new group has to lie within an old one"
            )
        weight_1DF = trained.get(f"{layer}.experts.{matching[0]}.{part}")
    else:
        weight_FD = trained.get(f"{layer}.{part}.weight")
        weight_1DF = None if weight_FD is None else weight_FD.t()[None]
    if weight_1DF is None:
        return None
    num_experts = config.num_experts[group]
    # A router that knows nothing weighs by one half.
    scale = 2.0 if part == "down" and num_experts > 1 else 1.0
    return scale * weight_1DF.expand(num_experts, -1, -1)


def plain_name(name: str) -> str:
    """The name of a parameter, with or without mixture-of-depths around its block."""
    return name.replace(".block.", ".")
