"""Study `causal_experts`: what experts by modality gain once their routes may not see the future.

Expert choice looks at the whole batch, later tokens included, so its own loss is not one that a decoder can have. Each
arm is trained alike on the episodes of `lapa.studies.dialects`; on held-out ones it is measured with its auxiliary
routers (causal_loss), after the paper's second phase that trains these alone (causal_loss_second_phase), and, for
comparison only, with expert choice (leaking_loss).

The first arm is a dense model that takes at least the FLOPs of MoMa with all its routers, the second one of at least
MoMa's parameters, at several times the FLOPs.
"""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lapa.backbones.auxiliary_router import auxiliary_routers, expert_choice, train_auxiliary_routers
from lapa.backbones.base import IMAGE, NUM_MODALITIES, ROBOT_ACTION, TEXT, Layout, build_backbone
from lapa.backbones.dense import feed_forward_width
from lapa.backbones.moma import MoMaTransformer
from lapa.backbones.upcycle import upcycle
from lapa.runtime import Compute
from lapa.schema import Backbone, CausalExpertsStudy, DenseBackbone, MoMaBackbone, Training
from lapa.studies.dialects import MODALITIES, SEQUENCE_LENGTH, VOCABULARY, World, draw_sequences, make_world
from lapa.studies.study import Arm, steps_to_reach
from lapa.trainer import finish, fit, read_log

NAMES = {TEXT: "text", IMAGE: "image", ROBOT_ACTION: "action"}
ALL_TOGETHER = [["text", "image", "latent_action", "proprioception", "robot_action"]]
NUM_CURVE_SEQUENCES = 48  # held-out sequences behind each point of the training curve
FIRST_SEED, SECOND_PHASE_SEED = 1000, 2000  # added to the seed, for sequences of their own

COLUMNS = [
    "causal_loss",
    "causal_loss_second_phase",
    "leaking_loss",
    "text_loss",
    "image_loss",
    "action_loss",
    "router_accuracy",
    "router_recall",
    "router_load",
    "left_out",
    "share_of_dense_steps",
    "mflops_a_token",
    "num_parameters",
]

NOTES = """
Held-out nats a token; true_entropy is what perfect knowledge leaves. causal_loss is what a decoder has: each token's
route from itself alone, as the model stands after training; text, image and action are its parts. leaking_loss uses the
routes of training, which see the future: no claim rests on it. router_accuracy counts a yes or no an expert against
expert choice (always no is right for 3 in 4 of 4 experts), router_recall the tokens of expert choice that were found,
router_load the tokens taken for each that it takes; left_out is the share of tokens that it gives to no expert.
mflops_a_token is measured in causal inference, auxiliary routers included. share_of_dense_steps is when the arm's
causal loss reached what the dense arm ends with (nan: not in some seed). `dense` has at least MoMa's FLOPs with all
routers, `dense_wide` at least its parameters. `moma_halved` has twice the experts at half their width, two a token.
`moma_depths` takes fewer FLOPs than the rest, at equal steps. One learning rate for all arms, not searched.
"""


def arms(study: CausalExpertsStudy) -> list[Arm]:
    """Dense of equal FLOPs and of equal parameters, a plain mixture, and MoMa in five forms.

    `moma_halved` has twice as many experts of half the width, and each token on average two of them.
    """
    moma = MoMaBackbone(
        width=study.width,
        num_layers=study.num_layers,
        num_heads=study.num_heads,
        mask="causal",
        router_noise=study.router_noise,
    )
    one_expert = dataclasses.replace(moma, num_experts=[1, 1, 1])
    configs: dict[str, Backbone] = {
        "dense": dense_like(moma, flops_of),
        "dense_wide": dense_like(moma, parameters_of),
        "mixture_8": dataclasses.replace(moma, groups=ALL_TOGETHER, num_experts=[8]),
        "one_expert_a_modality": one_expert,
        "moma": moma,
        "moma_halved": dataclasses.replace(
            moma, num_experts=[8, 8, 2], capacity_factor=2.0, feed_forward_ratio=moma.feed_forward_ratio / 2
        ),
        "moma_depths": dataclasses.replace(moma, depth_capacity=0.25),
    }
    plain = [Arm(name, partial(run, study, [config])) for name, config in configs.items()]
    return [*plain, Arm("moma_upcycled", partial(run, study, [one_expert, moma]))]


def dense_like(moma: MoMaBackbone, size_of) -> DenseBackbone:
    """The narrowest dense transformer that is at least of MoMa's size, by another feed-forward width."""
    names = {field.name for field in dataclasses.fields(DenseBackbone)} - {"name"}
    dense = DenseBackbone(**{name: getattr(moma, name) for name in names})
    while size_of(dense) < size_of(moma):
        dense = dataclasses.replace(dense, feed_forward_ratio=(feed_forward_width(dense) + 8) / dense.width)
    return dense


def flops_of(config: Backbone) -> int:
    """Of a forward pass over one sequence, auxiliary routers included."""
    backbone, lengths = build_backbone(config), np.bincount(MODALITIES, minlength=NUM_MODALITIES).tolist()
    auxiliary = backbone.auxiliary_flops(lengths) if isinstance(backbone, MoMaTransformer) else 0
    return backbone.forward_flops(lengths) + auxiliary


def parameters_of(config: Backbone) -> int:
    """All of them, active for a token or not."""
    return build_backbone(config).num_parameters()


class SequenceModel(nn.Module):
    """Next-token prediction over one vocabulary of all modalities."""

    def __init__(self, config: Backbone):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Parameter(torch.randn(SEQUENCE_LENGTH, config.width) * 0.5)
        self.backbone = build_backbone(config)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)

    def hidden(self, ids_BS: Tensor) -> Tensor:
        """Hidden states (B, S, D) of tokens (B, S), the first ones of a sequence."""
        length = ids_BS.shape[1]
        modality_ids_BS = torch.tensor(MODALITIES[:length], device=ids_BS.device).expand(len(ids_BS), -1)
        return self.backbone(self.embedding(ids_BS) + self.position[:length], Layout.of(modality_ids_BS))

    def token_losses(self, ids_BS: Tensor) -> Tensor:
        """Cross-entropy (B, S - 1) of every token but the first, in nats."""
        logits_BSV = self.head(self.hidden(ids_BS[:, :-1])).float()
        return F.cross_entropy(logits_BSV.transpose(1, 2), ids_BS[:, 1:], reduction="none")

    def loss(self, ids_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss with that of the auxiliary routers, and numbers to log."""
        loss, auxiliary = self.token_losses(ids_BS).mean(), self.backbone.auxiliary_loss()
        if auxiliary is None:
            return loss, {}
        return loss + auxiliary, {"token_loss": loss.detach(), "auxiliary_loss": auxiliary.detach()}


def run(study: CausalExpertsStudy, configs: list[Backbone], seed: int, folder: Path, compute: Compute) -> dict:
    """Train one arm and measure it; of two configurations the second is upcycled from the first, at a third of it."""
    world = make_world(seed)
    held_out_NS, log_p_NS = draw_sequences(world, study.num_held_out, np.random.default_rng([seed, 0, 2]))
    held_out_NS = held_out_NS.to(compute.device)
    training = dataclasses.replace(study.training, seed=seed, log_every_steps=study.curve_every_steps)
    num_first_steps = training.num_steps // 3 if len(configs) == 2 else 0
    model = SequenceModel(configs[0])
    if num_first_steps:
        first = dataclasses.replace(training, num_steps=num_first_steps, seed=seed + FIRST_SEED)
        train(model, world, held_out_NS, first, compute, folder / "first")
        model = upcycled(model, configs[0], configs[1], seed)
    rest = dataclasses.replace(training, num_steps=training.num_steps - num_first_steps)
    train(model, world, held_out_NS, rest, compute, folder)

    losses = held_out_losses(model, held_out_NS, training.batch_size)
    found = {
        "causal_loss": losses.pop("loss"),
        **losses,
        "share_of_dense_steps": (num_first_steps + steps_to_match(folder, seed)) / training.num_steps,
        "mflops_a_token": measured_flops(model, held_out_NS) / 1e6,
        "num_parameters": model.backbone.num_parameters(),
        "true_entropy": float(-log_p_NS[:, 1:].mean()),
    }
    if not auxiliary_routers(model):
        return found
    with expert_choice(model):
        found["leaking_loss"] = held_out_losses(model, held_out_NS, training.batch_size)["loss"]
    found |= router_numbers(model, held_out_NS, training.batch_size)
    second = dataclasses.replace(training, num_steps=study.second_phase_steps, seed=seed + SECOND_PHASE_SEED)
    draw = partial(draw_batch, world, training.batch_size, compute)
    train_auxiliary_routers(model, model.hidden, draw, second, compute, folder / "second_phase")
    finish(folder / "second_phase")
    found["causal_loss_second_phase"] = held_out_losses(model, held_out_NS, training.batch_size)["loss"]
    after = router_numbers(model, held_out_NS, training.batch_size)
    return found | {f"{name}_second_phase": value for name, value in after.items()}


def draw_batch(world: World, batch_size: int, compute: Compute, rng: np.random.Generator) -> Tensor:
    """Fresh sequences (B, S): none is seen twice."""
    return draw_sequences(world, batch_size, rng)[0].to(compute.device)


def train(
    model: SequenceModel, world: World, held_out_NS: Tensor, training: Training, compute: Compute, folder: Path
) -> None:
    """Train in place; the log has the causal held-out loss every `log_every_steps`."""
    curve_NS = held_out_NS[:NUM_CURVE_SEQUENCES]

    def evaluate() -> dict[str, float]:
        return {f"held_out_{name}": value for name, value in held_out_losses(model, curve_NS, 32).items()}

    fit(
        model,
        partial(draw_batch, world, training.batch_size, compute),
        model.loss,
        training,
        compute,
        folder,
        evaluate=evaluate,
        evaluate_every_steps=training.log_every_steps,
    )
    finish(folder)


def upcycled(model: SequenceModel, source: Backbone, config: Backbone, seed: int) -> SequenceModel:
    """A model with the backbone `config`, its experts copied from one of `source`."""
    prefix, state = "backbone.", model.state_dict()
    backbone = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    grown = SequenceModel(config)
    grown.load_state_dict(
        rest | {prefix + name: tensor for name, tensor in upcycle(backbone, source, config, seed).items()}
    )
    return grown


@torch.no_grad()
def held_out_losses(model: SequenceModel, ids_NS: Tensor, batch_size: int) -> dict[str, float]:
    """Nats a token, of all and by modality of the token that is predicted."""
    losses_NS = torch.cat([model.token_losses(ids_BS) for ids_BS in ids_NS.split(batch_size)])
    modality_S = torch.tensor(MODALITIES[1:])
    by_modality = {
        f"{name}_loss": losses_NS[:, modality_S == modality].mean().item() for modality, name in NAMES.items()
    }
    return {"loss": losses_NS.mean().item(), **by_modality}


@torch.no_grad()
def router_numbers(model: SequenceModel, ids_NS: Tensor, batch_size: int) -> dict[str, float]:
    """Auxiliary routers against expert choice, on the hidden states that expert choice led to."""
    counts: dict[str, float] = {}
    with expert_choice(model):
        for ids_BS in ids_NS.split(batch_size):
            model.hidden(ids_BS)
            for router in auxiliary_routers(model):
                for name, count in router.agreement().items():
                    # Depths leave most tokens out by design.
                    if router.output.out_features > 1 or not name.startswith(("tokens", "left_out")):
                        counts[name] = counts.get(name, 0.0) + count
    return {
        "router_accuracy": counts["right"] / counts["decisions"],
        "router_recall": counts["both"] / counts["chosen"],
        "router_load": counts["taken"] / counts["chosen"],
        "left_out": counts["left_out"] / counts["tokens"],
        "left_out_causal": counts["left_out_here"] / counts["tokens"],
    }


def steps_to_match(folder: Path, seed: int) -> float:
    """The step at which the curve reached the end of the dense arm's; NaN if it never did, or there is none."""
    curve = [row for row in read_log(folder.parent / f"dense-seed{seed}" / "log.jsonl") if "held_out_loss" in row]
    return steps_to_reach(folder, "held_out_loss", curve[-1]["held_out_loss"]) if curve else float("nan")


@torch.no_grad()
def measured_flops(model: SequenceModel, ids_NS: Tensor) -> float:
    """Of the backbone in inference, a token."""
    ids_BS = ids_NS[:16]
    # The fused attention of the CPU is not in the profiler's list; its plain form is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.hidden(ids_BS)
    return counter.get_total_flops() / ids_BS.numel()
