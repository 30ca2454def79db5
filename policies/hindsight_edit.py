"""Rewriting a trajectory: idling and ways back are cut, and what is left is smoothed within a distance.

Actions are displacements, so their sum is the path. An edit stays within `smooth_m` of the path that it is made of,
begins and ends where that does, and moves at the speed of the data. Whether it also does the same to the world is not
for this file to know: `lapa replay` carries it out in simulation.
"""

from collections.abc import Sequence

import numpy as np

TYPICAL_SPEED_QUANTILE = 0.75  # of the steps that move at all: those of purposeful motion, short of the noise


def typical_step(actions: np.ndarray, idle_m: float) -> float:
    """How far a step of purposeful motion goes, metres, from all actions (N, A) of a data set."""
    lengths = np.linalg.norm(actions, axis=1)
    moving = lengths[lengths >= idle_m]
    if not len(moving):
        raise ValueError(f"no action of the data is longer than edit.idle_m={idle_m}: nothing moves in them")
    return float(np.quantile(moving, TYPICAL_SPEED_QUANTILE))


def candidates(
    actions: np.ndarray, smooth_m: Sequence[float], idle_m: float, revisit_m: float, step_m: float
) -> list[np.ndarray]:
    """Edits of the actions (T, A) of one episode, the boldest first; those that save no step are left out.

    The last one cuts idling alone: where a way back has moved things, it is a part of what was done.

    Args:
        smooth_m: how far an edit may leave what remains after cutting, metres; one candidate each.
        idle_m: steps shorter than this are idling.
        revisit_m: a path that comes back as near as this to where it was is cut in between.
        step_m: length of a step of an edit.
    """
    path = path_of(actions, idle_m)
    direct = cut_ways_back(path, revisit_m)
    edited = [steps_along(direct[smooth(direct, distance)], step_m) for distance in sorted(smooth_m, reverse=True)]
    edited.append(steps_along(path[smooth(path, idle_m)], step_m))
    return [edit for edit in edited if 0 < len(edit) < len(actions)]


def path_of(actions: np.ndarray, idle_m: float) -> np.ndarray:
    """Points (K, A) visited, the first one the origin, without those that idle steps lead to; the end stays exact."""
    points = np.concatenate([np.zeros((1, actions.shape[1])), np.cumsum(actions, axis=0)])
    moves = np.linalg.norm(actions, axis=1) >= idle_m
    kept = points[np.concatenate([[True], moves])]
    kept[-1] = points[-1]
    return kept


def cut_ways_back(path: np.ndarray, revisit_m: float) -> np.ndarray:
    """The path (K, A) without its loops: from each point on, it goes on from its last visit to that place."""
    kept, here = [0], 0
    while here < len(path) - 1:
        near = np.flatnonzero(np.linalg.norm(path[here + 1 :] - path[here], axis=1) <= revisit_m)
        here = here + 1 + int(near[-1]) if len(near) else here + 1
        kept.append(here)
    return path[kept]


def smooth(path: np.ndarray, distance: float) -> np.ndarray:
    """Indices of the corners of a simpler path, within `distance` of all points (Douglas and Peucker 1973)."""
    first, last = path[0], path[-1]
    span = last - first
    along = np.clip((path - first) @ span / max(float(span @ span), 1e-12), 0, 1)
    away = np.linalg.norm(path - first - along[:, None] * span, axis=1)
    farthest = int(away.argmax())
    if len(path) < 3 or away[farthest] <= distance:
        return np.array([0, len(path) - 1])
    return np.concatenate([smooth(path[: farthest + 1], distance)[:-1], farthest + smooth(path[farthest:], distance)])


def steps_along(corners: np.ndarray, step_m: float) -> np.ndarray:
    """Actions (T, A) from corner (K, A) to corner, each at most step_m long and equally long within a stretch."""
    stretches = []
    for displacement in np.diff(corners, axis=0):
        count = int(np.ceil(np.linalg.norm(displacement) / step_m - 1e-9))
        if count:
            stretches.append(np.repeat(displacement[None] / count, count, axis=0))
    return np.concatenate(stretches).astype(np.float32) if stretches else np.zeros((0, corners.shape[1]), np.float32)
