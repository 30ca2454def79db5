"""What latent actions add to the first frame, where the frame alone tells most of the action."""

import numpy as np
import pytest

from lapa.metrics import EpisodeBootstrap
from lapa.quantizer.latent_actions import LatentActions
from lapa.quantizer.probes import fit_probes, probe_metrics


class GreyPairs:
    """Pairs whose action is the brightness of the first frame, and a little of a sign that no frame shows."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.brightness = rng.integers(0, 256, 400)
        self.sign = rng.choice([-1.0, 1.0], 400)

    def displacements(self, indices):
        return (self.brightness / 64 + self.sign)[indices, None]

    def frames(self, indices):
        return np.broadcast_to(self.brightness[indices, None, None, None, None], (len(indices), 2, 16, 16, 3)).astype(
            np.uint8
        )


@pytest.mark.parametrize(("tells_the_sign", "gain"), [(True, 0.45), (False, 0.0)])
def test_a_latent_action_is_worth_what_it_adds_to_the_first_frame(tells_the_sign, gain):
    train, held_out = GreyPairs(0), GreyPairs(1)
    noise = np.random.default_rng(2)
    encoded = []
    for pairs in (train, held_out):
        codes = pairs.sign if tells_the_sign else noise.choice([-1.0, 1.0], 400)
        encoded.append(LatentActions(np.arange(400), (codes[:, None] > 0).astype(int), codes[:, None]))
    probes = fit_probes(train, encoded[0], is_discrete=True, seed=0)
    metrics = probe_metrics(probes, held_out, encoded[1], EpisodeBootstrap(np.arange(400) // 10, 0))
    assert metrics["linear_probe_r2"] < metrics["present_frame_probe_r2"], "on its own it tells less than the frame"
    assert metrics["latent_gain_r2"] == pytest.approx(gain, abs=0.1)
    assert (metrics["latent_gain_r2_low"] > 0) == tells_the_sign
