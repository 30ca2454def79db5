"""Motions shared by the gripper's experts: grasp a block; put it somewhere and let go.

Experts read the scene's true state, keep no memory, and are deterministic: noise is added by who calls them.
An action is (4,): the displacement in x, y and z, and the opening that the fingers shall have, metres.
"""

import numpy as np

from envs.gripper.arena import BLOCK_SIZE, FINGERTIP, MAX_OPENING, MAX_STEP
from envs.gripper.scene import Scene

OPEN, CLOSED = MAX_OPENING, 0.0
TRAVEL_Z = 0.11  # high enough that a held block passes over the others
CLEAR_Z = BLOCK_SIZE + FINGERTIP + 0.026  # high enough that the open fingers do, noise included
NEAR = 0.012  # sideways: the open fingers may go down on both sides of the block
RELEASE, ARRIVED = 0.007, 0.016  # sideways from the goal: to let go of a block, and to leave a released one there
ABOVE = 0.003  # the goal, when a block is let go


def move(displacement: np.ndarray, opening: float) -> np.ndarray:
    """An action (4,); a displacement (3,) beyond what one step can do is cut."""
    return np.array([*np.clip(displacement, -MAX_STEP, MAX_STEP), opening])


def rise(scene: Scene, opening: float) -> np.ndarray:
    return move(np.array([0, 0, TRAVEL_Z - scene.gripper[2]]), opening)


def grasp(scene: Scene, block: int) -> np.ndarray:
    """Above the block, down on both sides of it, and close."""
    away = scene.positions[block] - scene.gripper
    sideways = float(np.abs(away[:2]).max())
    if sideways < NEAR:
        return move(away, CLOSED if abs(away[2]) < NEAR else OPEN)
    if scene.gripper[2] < CLEAR_Z - 0.015 and sideways > 2 * NEAR:
        return rise(scene, OPEN)
    return move(np.array([*away[:2], CLEAR_Z - scene.gripper[2]]), OPEN)


def put(scene: Scene, block: int, goal: np.ndarray) -> np.ndarray:
    """Grasp the block, carry it to goal (3,), the place of its centre, let go, and leave upwards."""
    away = goal - scene.positions[block]
    sideways = float(np.abs(away[:2]).max())
    close_enough = RELEASE if scene.is_held(block) else ARRIVED
    if sideways < close_enough and abs(away[2]) < ABOVE + 0.008:
        leaving = scene.opening > BLOCK_SIZE + 0.02 and not scene.touched[block].any()
        return rise(scene, OPEN) if leaving else move(np.zeros(3), OPEN)
    if not scene.is_held(block):
        return grasp(scene, block)
    if sideways < NEAR:
        # The last step down waits until the block is right above its place.
        down = away[2] + ABOVE if sideways < RELEASE or away[2] < -MAX_STEP else 0.0
        return move(np.array([*away[:2], down]), CLOSED)
    if scene.gripper[2] < TRAVEL_Z - MAX_STEP:
        return rise(scene, CLOSED)
    return move(np.array([*away[:2], TRAVEL_Z - scene.gripper[2]]), CLOSED)
