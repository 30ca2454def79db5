"""How data become noise and come back: denoising diffusion, or flow matching.

Time runs from 0 (the data) to 1 (noise alone) in both:

    Diffusion   x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise
    Flow        x_t = (1 - t) x_0 + t noise

A model predicts from (x_t, t) what `predicts` says, by squared error:

    data        x_0: what a small model learns in few steps
    papers      the noise (diffusion) or the velocity, noise - x_0 (flow): the papers' objectives

Diffusion: Ho et al. 2020 (arXiv 2006.11239) with the cosine schedule of Nichol and Dhariwal 2021 (arXiv 2102.09672) and
the samplers of Song et al. 2021 (arXiv 2010.02502). Flow: Lipman et al. 2023 (arXiv 2210.02747), by Euler steps.

Shapes: B batch, ... what is denoised (an image, a chunk of actions).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t (B, ...) and times (B,) to a prediction (B, ...)


class NoiseProcess(nn.Module):
    """What diffusion and flow have in common.

    Args:
        predicts: data or papers, see above.
    """

    def __init__(self, predicts: str = "data"):
        super().__init__()
        if predicts not in ("data", "papers"):
            raise ValueError(f"predicts is {predicts!r}, expected data or papers")
        self.predicts_data = predicts == "data"

    def draw_times(self, count: int, generator: torch.Generator | None = None, most: Tensor | float = 1.0) -> Tensor:
        """Times (B,) in (0, most], uniform, on the CPU.

        Args:
            most: the noise cap, one or one a row (B,) on the CPU; 0.5 is t <= 500 of 1000 steps.
        """
        raise NotImplementedError

    def scales(self, time_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the data and how much noise x_t holds, (B, 1, ...) both, to be multiplied with `like`."""
        raise NotImplementedError

    def corrupt(self, clean: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
        """x_t (B, ...) from x_0 (B, ...)."""
        keep, add = self.scales(time_B, clean)
        return keep * clean + add * noise

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What the model is to predict (B, ...)."""
        return clean if self.predicts_data else self.papers_target(clean, noise)

    def papers_target(self, clean: Tensor, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(
        self,
        predict: Predict,
        start: Tensor,
        num_steps: int,
        limit: Tensor | float = math.inf,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x_0 (B, ...) from noise `start`, in `num_steps` calls of `predict`.

        Args:
            limit: the data lie in [-limit, limit].
            generator: for the noise of samplers that add some on the way.
        """
        raise NotImplementedError


class Diffusion(NoiseProcess):
    """DDPM.

    Args:
        num_train_steps: T; times are multiples of 1 / T.
        stochasticity: eta of Song et al. 2021: 0 is DDIM, deterministic from `start` on; 1 is DDPM's posterior.
    """

    share_T: Tensor  # a_t for t = 0 to T

    def __init__(self, predicts: str = "data", num_train_steps: int = 1000, stochasticity: float = 0.0):
        super().__init__(predicts)
        self.num_train_steps, self.stochasticity = num_train_steps, stochasticity
        self.register_buffer("share_T", cosine_schedule(num_train_steps), persistent=False)

    def draw_times(self, count: int, generator: torch.Generator | None = None, most: Tensor | float = 1.0) -> Tensor:
        uniform_B = torch.rand(count, generator=generator)
        steps_B = (uniform_B * most * self.num_train_steps).floor() + 1
        return steps_B.clamp(max=self.num_train_steps) / self.num_train_steps

    def scales(self, time_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        step_B = (time_B * self.num_train_steps).round().long()
        share = self.share_T[step_B].view(-1, *[1] * (like.ndim - 1))
        return share.sqrt(), (1 - share).sqrt()

    def papers_target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise

    def posterior(self, noised: Tensor, clean: Tensor, share: Tensor, share_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and standard deviation of the less noisy x, given x_t and x_0 (Song et al. 2021, equation 7).

        With stochasticity 1 and neighbouring steps it is DDPM's posterior (Ho et al. 2020, equation 7).

        Args:
            share, share_next: a_t of now and of the less noisy time.
        """
        noise = (noised - share.sqrt() * clean) / (1 - share).sqrt()
        variance = self.stochasticity**2 * (1 - share_next) / (1 - share) * (1 - share / share_next)
        return share_next.sqrt() * clean + (1 - share_next - variance).clamp(min=0).sqrt() * noise, variance.sqrt()

    def sample(
        self,
        predict: Predict,
        start: Tensor,
        num_steps: int,
        limit: Tensor | float = math.inf,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        x, bound = start, torch.as_tensor(limit, device=start.device)
        # The middles of equal spans: at t = 1 itself the noise says nothing of the data, however well it is predicted.
        middles = (torch.arange(num_steps, 0, -1) - 0.5) / num_steps
        steps = [*(middles * self.num_train_steps).ceil().long().tolist(), 0]
        for step, next_step in pairwise(steps):
            clean = predict(x, torch.full((len(x),), step / self.num_train_steps, device=x.device))
            share, share_next = self.share_T[step], self.share_T[next_step]
            if not self.predicts_data:
                clean = (x - (1 - share).sqrt() * clean) / share.sqrt()
            x, deviation = self.posterior(x, clean.clamp(-bound, bound), share, share_next)
            if self.stochasticity and next_step:
                x = x + deviation * torch.randn(x.shape, generator=generator).to(x.device)
        return x


class Flow(NoiseProcess):
    """Flow matching along straight lines."""

    def draw_times(self, count: int, generator: torch.Generator | None = None, most: Tensor | float = 1.0) -> Tensor:
        return (1 - torch.rand(count, generator=generator)) * most

    def scales(self, time_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        time = time_B.view(-1, *[1] * (like.ndim - 1))
        return 1 - time, time

    def papers_target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise - clean

    def sample(
        self,
        predict: Predict,
        start: Tensor,
        num_steps: int,
        limit: Tensor | float = math.inf,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        x, bound = start, torch.as_tensor(limit, device=start.device)
        for step in range(num_steps, 0, -1):
            time = step / num_steps
            velocity = predict(x, torch.full((len(x),), time, device=x.device))
            if self.predicts_data:
                velocity = (x - velocity.clamp(-bound, bound)) / time
            x = x - velocity / num_steps
        return x.clamp(-bound, bound)


def cosine_schedule(num_steps: int) -> Tensor:
    """The data's share a_t of the variance for t = 0 to T (T + 1,) float32, 1 to nearly 0.

    Nichol and Dhariwal 2021, equation 17; the noise added in one step is at most 0.999 of the variance.
    """
    offset = 0.008
    angle = (torch.arange(num_steps + 1, dtype=torch.float64) / num_steps + offset) / (1 + offset) * math.pi / 2
    kept = (angle[1:].cos() / angle[:-1].cos()).square().clamp(min=0.001)
    return torch.cat([torch.ones(1, dtype=torch.float64), kept.cumprod(0)]).float()


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): 1 is the conditional prediction."""
    return unconditional + guidance * (conditional - unconditional)


class TimeEmbedding(nn.Module):
    """Times (B,) in [0, 1] to (B, D)."""

    frequency_F: Tensor

    def __init__(self, width: int, num_frequencies: int = 32):
        super().__init__()
        self.register_buffer("frequency_F", 1000.0 ** torch.linspace(0, 1, num_frequencies), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time_B: Tensor) -> Tensor:
        angle_BF = time_B[:, None] * self.frequency_F
        return self.layers(torch.cat([angle_BF.sin(), angle_BF.cos()], dim=1))


def build_noise_process(name: str, predicts: str = "data") -> NoiseProcess:
    """`diffusion` or `flow`; ValueError for another name."""
    if name == "diffusion":
        return Diffusion(predicts)
    if name == "flow":
        return Flow(predicts)
    raise ValueError(f"unknown noise process {name!r}: known are ['diffusion', 'flow']")
