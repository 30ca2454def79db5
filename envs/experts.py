"""Motions shared by the scripted experts: push a block towards a point, past the blocks in between.

Experts read the scene's true state, keep no memory, and are deterministic: noise is added by who calls them.
"""

import numpy as np

from envs.arena import BLOCK_RANGE, CONTACT_DISTANCE
from envs.blocks import BLOCK_RADIUS
from envs.scene import Scene

CLEARANCE = 0.012  # kept between the tip and a block while walking around it, metres


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def limited(displacement: np.ndarray, length: float) -> np.ndarray:
    """The displacement (2,), shortened to at most `length` metres."""
    return unit(displacement) * min(float(np.linalg.norm(displacement)), length)


def nearest_on_segment(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    span = end - start
    along = np.clip(np.dot(point - start, span) / max(float(np.dot(span, span)), 1e-9), 0, 1)
    return start + along * span


def walk_around(tip: np.ndarray, goal: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """The next waypoint (2,) on a way from tip to goal that stays `radius` metres away from centre."""
    if np.linalg.norm(centre - nearest_on_segment(centre, tip, goal)) >= radius - 0.004:
        return goal
    from_centre, to_goal = tip - centre, goal - centre
    angle = np.arctan2(from_centre[1], from_centre[0])
    turn = (np.arctan2(to_goal[1], to_goal[0]) - angle + np.pi) % (2 * np.pi) - np.pi
    turn = np.clip(turn, -0.6, 0.6)
    return centre + radius * np.array([np.cos(angle + turn), np.sin(angle + turn)])


def detour(start: np.ndarray, goal: np.ndarray, obstacles: np.ndarray, radius: float, limit: float) -> np.ndarray:
    """The next waypoint (2,) from start to goal, beside the first obstacle (n, 2) within `radius` of the way.

    The side is the one the straight way passes on already, unless that lies off the table (beyond `limit`).
    """
    blocking = []
    for obstacle in obstacles:
        nearest = nearest_on_segment(obstacle, start, goal)
        # An obstacle at the goal cannot be passed; one behind the start is no obstacle.
        ahead = np.dot(obstacle - start, goal - start) > 0
        if ahead and np.linalg.norm(obstacle - nearest) < radius and np.linalg.norm(obstacle - goal) > radius:
            blocking.append((float(np.linalg.norm(nearest - start)), obstacle, nearest))
    if not blocking:
        return goal
    _, obstacle, nearest = min(blocking, key=lambda item: item[0])
    way = unit(goal - start)
    side = np.array([-way[1], way[0]])
    if np.dot(nearest - obstacle, side) < 0:
        side = -side
    for candidate in (side, -side):
        waypoint = obstacle + candidate * radius * 1.1
        if np.abs(waypoint).max() <= limit:
            return waypoint
    return goal


def push_towards(scene: Scene, block: int, goal: np.ndarray, reference: int | None = None) -> np.ndarray:
    """A displacement (2,) that walks behind the block, then pushes it towards goal (2,).

    The other blocks are passed at the side, except `reference`, which the block may run into.
    """
    position = scene.blocks_xy[block]
    others = np.array([xy for i, xy in enumerate(scene.blocks_xy) if i not in (block, reference)]).reshape(-1, 2)
    aim = detour(position, goal, others, 2 * BLOCK_RADIUS + 0.01, BLOCK_RANGE)
    direction = unit(aim - position)
    offset = scene.tip_xy - position
    aligned = float(np.dot(unit(-offset), direction))
    distance = float(np.linalg.norm(offset))
    if aligned > 0.9 and distance < CONTACT_DISTANCE + 2 * CLEARANCE:
        remaining = float(np.linalg.norm(aim - position))
        # Slower while crooked: a push off the centre line sends the block sideways.
        forward = min(scene.max_step, remaining + 0.005) * (1.0 if aligned > 0.98 else 0.5)
        return limited(position + direction * (forward - CONTACT_DISTANCE) - scene.tip_xy, scene.max_step)
    behind = position - direction * (CONTACT_DISTANCE + CLEARANCE)
    waypoint = walk_around(scene.tip_xy, behind, position, CONTACT_DISTANCE + CLEARANCE)
    return limited(waypoint - scene.tip_xy, scene.max_step)
