"""Study `facts`: what a backbone can learn by heart, and whether that helps with a rule.

A question is three tokens: two syllables that name an object, and a task. The answer is one of 64 attributes. The
answers of facts are random, so that nothing but memory gives them: recall is measured on the facts that were learned,
after equal steps whatever their number. The answers of rule tasks (the larger or the smaller syllable) follow from the
tokens; accuracy is measured on objects that rule tasks never named in training.

Objects share syllables, so the embeddings do not grow with the number of facts; only the backbones differ.

Shapes: B batch, Q = 3 tokens of a question, A attributes, T tokens, D width, E experts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.backbones.base import TEXT, Backbone, Layout, build_backbone
from lapa.backbones.dense import DenseTransformer, FeedForward
from lapa.backbones.memory import MemoryTransformer
from lapa.backbones.routing import route
from lapa.runtime import Compute
from lapa.schema import DenseBackbone, FactsStudy, MemoryBackbone, Training
from lapa.studies.study import Arm
from lapa.trainer import finish, fit

NUM_SYLLABLES = 64
NUM_OBJECTS = NUM_SYLLABLES**2
NUM_TASKS = 16  # whose answers are facts
NUM_RULES = 2
NUM_ATTRIBUTES = 64
QUESTION_LENGTH = 3
FIRST_TASK = NUM_SYLLABLES
FIRST_RULE = FIRST_TASK + NUM_TASKS
VOCABULARY = FIRST_RULE + NUM_RULES
HELD_OUT_EVERY = 9  # each such object is in no rule question of the training; no divisor of NUM_SYLLABLES
NUM_RULE_QUESTIONS = 3000  # of the held-out objects, for accuracy
BALANCE_WEIGHT = 0.01  # of the mixture's load balancing (arXiv 2101.03961)

COLUMNS = [
    "recall",
    "recall_1000",
    "recall_2000",
    "recall_4000",
    "rule_accuracy",
    "slots_used",
    "slot_kl_nats",
    "forward_megaflops",
    "parameters",
    "train_cpu_s",
]
NOTES = """
recall_n: share of n random facts that are answered after training, 1/64 by chance; recall is the mean over all n, and
study.png its curve. Every arm has the same steps, batches and learning rate (the best tried for each of them).
dense has the FLOPs of memory_plus, dense_wide its parameters at more FLOPs, mixture (top-1 of experts) has both;
memory replaces the feed-forward of one layer and memory_plus of more, which share the table.
rule_accuracy is on held-out objects: no gain is expected of a memory there, for a rule is not a fact.
slots_used is the share of the table that questions about the most facts read, slot_kl_nats how unevenly (0: evenly).
"""


@dataclass(frozen=True)
class Facts:
    """Questions (n, Q) int64 and their answers (n,) int64."""

    questions: np.ndarray
    answers: np.ndarray


def draw_facts(num_facts: int, rng: np.random.Generator) -> Facts:
    """Different pairs of object and task, each with an attribute that is drawn for it."""
    if not 1 <= num_facts <= NUM_OBJECTS * NUM_TASKS:
        raise ValueError(f"study.num_facts has {num_facts}, expected 1 to {NUM_OBJECTS * NUM_TASKS}")
    pairs = rng.choice(NUM_OBJECTS * NUM_TASKS, num_facts, replace=False)
    questions = questions_about(pairs // NUM_TASKS, FIRST_TASK + pairs % NUM_TASKS)
    return Facts(questions, rng.integers(0, NUM_ATTRIBUTES, num_facts))


def draw_rules(num_questions: int, held_out: bool, rng: np.random.Generator) -> Facts:
    """Questions whose answer is the larger or the smaller syllable of the object."""
    objects = rng.integers(0, NUM_OBJECTS // HELD_OUT_EVERY, num_questions) * HELD_OUT_EVERY
    if not held_out:
        objects += rng.integers(1, HELD_OUT_EVERY, num_questions)
    rules = rng.integers(0, NUM_RULES, num_questions)
    questions = questions_about(objects, FIRST_RULE + rules)
    return Facts(questions, np.sort(questions[:, :2], axis=1)[np.arange(num_questions), 1 - rules])


def questions_about(objects: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """(n, Q): the syllables of the objects, and the tasks' tokens."""
    return np.stack([objects // NUM_SYLLABLES, objects % NUM_SYLLABLES, tasks], axis=1)


class AttributeModel(nn.Module):
    """Token embeddings, a backbone, and a linear head on the last token."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, backbone.width)
        self.position = nn.Parameter(torch.randn(QUESTION_LENGTH, backbone.width))
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, NUM_ATTRIBUTES)

    def forward(self, questions_BQ: Tensor) -> Tensor:
        """Logits (B, A)."""
        layout = Layout.of(torch.full_like(questions_BQ, TEXT))
        return self.head(self.backbone(self.embedding(questions_BQ) + self.position, layout)[:, -1])


class Mixture(nn.Module):
    """Feed-forwards of which a token goes through the one that its router likes best (Switch, arXiv 2101.03961)."""

    def __init__(self, config: DenseBackbone, num_experts: int):
        super().__init__()
        self.router = nn.Linear(config.width, num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(num_experts))
        self.balance_loss: Tensor | None = None

    def forward(self, x_BSD: Tensor, layout: Layout) -> Tensor:
        num_experts = len(self.experts)
        with torch.autocast(x_BSD.device.type, enabled=False):
            probability_BSE = F.linear(x_BSD.float(), self.router.weight).softmax(-1)
        weight_BS, expert_BS = probability_BSE.max(-1)
        routing = route(expert_BS, num_experts)
        if self.training:
            share_E = torch.tensor(routing.lengths, device=x_BSD.device) / expert_BS.numel()
            self.balance_loss = num_experts * (share_E * probability_BSE.mean((0, 1))).sum()
        segments = zip(self.experts, routing.split(x_BSD), strict=True)
        return routing.merge([expert(x_TD, layout) for expert, x_TD in segments]) * weight_BS[..., None]


class MixtureTransformer(DenseTransformer):
    """A dense transformer whose feed-forwards are mixtures: the mixture of experts that memory is compared with."""

    def __init__(self, config: DenseBackbone, num_experts: int):
        self.num_experts = num_experts
        super().__init__(config)

    def build_feed_forward(self, layer: int) -> nn.Module:
        return Mixture(self.config, self.num_experts)

    def feed_forward_flops(self, modality_lengths: Sequence[int]) -> int:
        router = 2 * sum(modality_lengths) * self.config.width * self.num_experts
        return super().feed_forward_flops(modality_lengths) + router

    def auxiliary_loss(self) -> Tensor | None:
        """Switch's load balancing, all layers together."""
        losses = [module.balance_loss for module in self.modules() if isinstance(module, Mixture)]
        return BALANCE_WEIGHT * torch.stack([loss for loss in losses if loss is not None]).sum()


def forward_flops(backbone: Backbone) -> int:
    """Of one question."""
    return backbone.forward_flops([QUESTION_LENGTH, 0, 0, 0, 0])


def fitting_size(count: Callable[[int], int], goal: int, step: int = 1) -> int:
    """The multiple of `step` for which a count that grows evenly with the size comes nearest to the goal."""
    first, second = count(step), count(2 * step)
    return step * max(1, round(1 + (goal - first) / (second - first)))


def builders(study: FactsStudy) -> dict[str, Callable[[], Backbone]]:
    """Every arm's backbone, with random weights when it is called.

    Widths of feed-forwards are chosen so that all arms have the FLOPs of memory_plus; dense_wide and mixture have its
    parameters, the former at more FLOPs.
    """
    plus = MemoryBackbone(
        width=study.width,
        num_layers=study.num_layers,
        num_heads=study.num_heads,
        mask="bidirectional",
        memory_layers=study.memory_layers,
        num_half_keys=study.num_half_keys,
        num_memory_heads=study.num_memory_heads,
        num_best_slots=study.num_best_slots,
        key_width=study.key_width,
        value_learning_rate_ratio=study.value_learning_rate_ratio,
    )
    plain = replace(plus, memory_layers=[study.num_layers // 2], memory_gate=False)
    shared = {field.name: getattr(plus, field.name) for field in fields(DenseBackbone)}
    dense = DenseBackbone(**{**shared, "name": "dense"})
    target = build_backbone(plus)
    flops, parameters = forward_flops(target), target.num_parameters()

    def resized(config: DenseBackbone, hidden: int) -> DenseBackbone:
        return replace(config, feed_forward_ratio=hidden / study.width)

    def at_equal_flops(config: DenseBackbone) -> DenseBackbone:
        return resized(config, fitting_size(lambda f: forward_flops(build_backbone(resized(config, f))), flops, 8))

    same_flops, plain_same_flops = at_equal_flops(dense), at_equal_flops(plain)
    wide = resized(dense, fitting_size(lambda f: build_backbone(resized(dense, f)).num_parameters(), parameters, 8))
    num_experts = fitting_size(lambda count: MixtureTransformer(same_flops, count).num_parameters(), parameters)
    return {
        "dense": lambda: build_backbone(same_flops),
        "dense_wide": lambda: build_backbone(wide),
        "mixture": lambda: MixtureTransformer(same_flops, num_experts),
        "memory": lambda: build_backbone(plain_same_flops),
        "memory_plus": lambda: build_backbone(plus),
    }


def arms(study: FactsStudy) -> list[Arm]:
    """The dense control first: the others are compared with it."""
    return [Arm(name, partial(run_arm, study, build)) for name, build in builders(study).items()]


def run_arm(
    study: FactsStudy, build: Callable[[], Backbone], seed: int, folder: Path, compute: Compute
) -> dict[str, float]:
    """Train on every number of facts anew; what each model answers, and what it cost."""
    numbers: dict[str, float] = {}
    rule_accuracies, started = [], time.process_time()
    for num_facts in study.num_facts:
        facts = draw_facts(num_facts, np.random.default_rng([seed, num_facts]))
        torch.manual_seed(seed)
        model = AttributeModel(build())
        train(model, facts, study, seed, folder / f"facts-{num_facts}", compute)
        numbers[f"recall_{num_facts}"] = share_answered(model, facts, compute)
        held_out = draw_rules(NUM_RULE_QUESTIONS, True, np.random.default_rng([seed, num_facts, 1]))
        rule_accuracies.append(share_answered(model, held_out, compute))
    numbers["train_cpu_s"] = time.process_time() - started
    numbers["recall"] = float(np.mean([numbers[f"recall_{num_facts}"] for num_facts in study.num_facts]))
    numbers["rule_accuracy"] = float(np.mean(rule_accuracies))
    numbers["forward_megaflops"] = forward_flops(model.backbone) / 1e6
    numbers["parameters"] = model.backbone.num_parameters()
    if isinstance(model.backbone, MemoryTransformer):
        numbers |= slot_usage(model, model.backbone, facts, compute)
    return numbers


def train(
    model: AttributeModel,
    facts: Facts,
    study: FactsStudy,
    seed: int,
    folder: Path,
    compute: Compute,
) -> None:
    """Batches of facts and rule questions, the same for every arm."""
    num_rules = round(study.rule_share * study.batch_size)
    training = Training(
        num_steps=study.num_steps,
        batch_size=study.batch_size,
        learning_rate=study.learning_rate,
        warmup_steps=max(1, study.num_steps // 20),
        log_every_steps=min(100, study.num_steps),
        checkpoint_every_steps=500,
        tensorboard=False,
        seed=seed,
    )

    def make_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = rng.integers(0, len(facts.answers), study.batch_size - num_rules)
        rules = draw_rules(num_rules, False, rng)
        questions_BQ = np.concatenate([facts.questions[rows], rules.questions])
        answers_B = np.concatenate([facts.answers[rows], rules.answers])
        return torch.from_numpy(questions_BQ).to(compute.device), torch.from_numpy(answers_B).to(compute.device)

    def loss_function(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        questions_BQ, answers_B = batch
        loss = F.cross_entropy(model(questions_BQ).float(), answers_B)
        auxiliary = model.backbone.auxiliary_loss()
        return loss if auxiliary is None else loss + auxiliary, {"answer_nats": loss.detach()}

    fit(model, make_batch, loss_function, training, compute, folder, description=folder.name)
    finish(folder)


@torch.inference_mode()
def share_answered(model: AttributeModel, facts: Facts, compute: Compute) -> float:
    """Share of the questions whose likeliest attribute is the answer."""
    with compute.autocast():
        logits = [model(torch.from_numpy(part).to(compute.device)) for part in in_parts(facts.questions)]
    return float((torch.cat(logits).argmax(-1).cpu().numpy() == facts.answers).mean())


@torch.inference_mode()
def slot_usage(model: AttributeModel, backbone: MemoryTransformer, facts: Facts, compute: Compute) -> dict[str, float]:
    """Share of the table that questions about the facts read, and how far from evenly: KL(weight read || uniform)."""
    weight_read = torch.zeros(len(backbone.memory.weight), dtype=torch.float64, device=compute.device)

    def count(module: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        slots_TK, weights_TK = inputs
        weight_read.index_add_(0, slots_TK.flatten(), weights_TK.flatten().double())

    hook = backbone.memory.register_forward_hook(count)
    share_answered(model, facts, compute)
    hook.remove()
    share = weight_read / weight_read.sum()
    divergence = torch.special.xlogy(share, share * len(share)).sum()
    return {"slots_used": float((weight_read > 0).double().mean()), "slot_kl_nats": float(divergence)}


def in_parts(questions: np.ndarray, size: int = 2048) -> list[np.ndarray]:
    return [questions[start : start + size] for start in range(0, len(questions), size)]


def draw(results: dict[str, dict], path: Path) -> None:
    """Recall against the number of facts, with the interval over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for arm, values in results.items():
        sizes = sorted(int(name.removeprefix("recall_")) for name in values if name.startswith("recall_"))
        entries = [values[f"recall_{size}"] for size in sizes]
        (line,) = axes.plot(sizes, [entry["mean"] for entry in entries], marker="o", label=arm)
        low, high = ([entry[side] for entry in entries] for side in ("low", "high"))
        axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(1 / NUM_ATTRIBUTES, color="grey", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel="facts to learn", ylabel="share recalled", ylim=(0, 1.02))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
