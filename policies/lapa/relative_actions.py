"""Actions as distances, inside the policy: outside they stay what the data set has, positions to go to.

Distances from the state, or from the action before the chunk: a joint under load, or one that a position controller
pulls softly, stays behind what it is commanded, and the state then does not tell the command.

LeRobot's own relative actions are a pair of processor steps: what is predicted from one state is added to the state of
the step that carries it out, which is another one wherever a chunk is carried out over several steps. Here the place
that was seen is added to the whole chunk at once, so queues, servers and real-time chunking need to know nothing of it.

Shapes: B batch, N samples, T chunk size, A action dimensions, which are also the state's.
"""

from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from policies.lapa.configuration_lapa import LapaConfig

LEAST_STD_SHARE = 0.05  # of the largest standard deviation over the steps of a chunk


def build_relative_actions(config: LapaConfig) -> "RelativeActions":
    """ValueError where state and action differ in size, so that one cannot be told from the other."""
    assert config.action_feature is not None and config.robot_state_feature is not None
    action_dim, state_dim = config.action_feature.shape[0], config.robot_state_feature.shape[0]
    if action_dim != state_dim:
        raise ValueError(
            f"relative_actions needs an action and a state of the same numbers, they have {action_dim} and {state_dim} "
            "of them: set relative_actions=false"
        )
    return RelativeActions(config.chunk_size, action_dim)


class RelativeActions(nn.Module):
    """Normalised actions (B, T, A) to normalised distances from a place (B, 1, A), and back.

    Its numbers are buffers, saved with the weights: scale and shift (A,) turn a normalised state into a normalised
    action; mean and std (T, A) are those of the distances, which grow from the first step of a chunk to its last.
    """

    def __init__(self, chunk_size: int, action_dim: int):
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("scale", torch.ones(action_dim))
        self.register_buffer("shift", torch.zeros(action_dim))
        self.register_buffer("mean", torch.zeros(chunk_size, action_dim))
        self.register_buffer("std", torch.ones(chunk_size, action_dim))

    def fit(self, statistics: dict[str, dict[str, Any]]) -> None:
        """From "mean" and "std" (A,) that `action` and `observation.state` are normalised by."""
        action, state = (
            {name: torch.as_tensor(statistics[key][name], dtype=torch.float32) for name in ("mean", "std")}
            for key in (ACTION, OBS_STATE)
        )
        self.scale.copy_(state["std"] / action["std"])
        self.shift.copy_((state["mean"] - action["mean"]) / action["std"])

    def fit_distances(self, distances_NTA: Tensor, is_pad_NT: Tensor) -> None:
        """From distances action - place, divided by the standard deviation of the action."""
        kept_NT1 = (~is_pad_NT)[..., None].to(distances_NTA.dtype)
        count_T1 = kept_NT1.sum(0).clamp_min(1)
        mean_TA = (distances_NTA * kept_NT1).sum(0) / count_T1
        std_TA = (((distances_NTA - mean_TA).square() * kept_NT1).sum(0) / count_T1).sqrt()
        self.mean.copy_(mean_TA)
        # A joint that hardly moves at first is not told apart from noise more finely than a share of all its motion.
        self.std.copy_(std_TA.maximum(LEAST_STD_SHARE * std_TA.amax(0)).clamp_min(1e-6))

    def place(self, state_BA: Tensor, last_BA: Tensor | None = None, has_last_B: Tensor | None = None) -> Tensor:
        """(B, 1, A): where distances begin, as a normalised action: the last action where there is one, or the state.

        Args:
            last_BA: normalised; None: there is none, as when an episode begins.
            has_last_B: bool, which rows of it count; None: all.
        """
        place_BA = state_BA * self.scale + self.shift
        if last_BA is not None:
            place_BA = last_BA if has_last_B is None else torch.where(has_last_B[:, None], last_BA, place_BA)
        return place_BA[:, None]

    def distances(self, actions_BTA: Tensor, place_B1A: Tensor) -> Tensor:
        return (actions_BTA - place_B1A - self.mean) / self.std

    def actions(self, distances_BTA: Tensor, place_B1A: Tensor) -> Tensor:
        return distances_BTA * self.std + self.mean + place_B1A
