"""Rendered environment steps per second on this machine: `python -m envs.benchmark --suites tabletop gripper`.

Ours (frames drawn without shadows or multisampling, in a buffer of their size, and box-filtered) against MuJoCo's
renderer with the settings it has when nothing is set.
"""

import argparse
import time

import numpy as np

from envs.gripper.env import GripperEnv
from envs.rendering import mujoco
from envs.tabletop import TabletopEnv

EPISODE_STEPS = 20
Env = TabletopEnv | GripperEnv


def fullest_env(suite: str, image_size: int) -> Env:
    """An environment of the suite with as many blocks as fit."""
    if suite == "gripper":
        return GripperEnv("stack", image_size=image_size, num_blocks=4)
    return TabletopEnv("block_to_block", image_size=image_size, num_blocks=8)


class DefaultRenderer:
    """The same scene through mujoco.Renderer with its default buffer, multisampling, shadows and reflections."""

    def __init__(self, env: Env) -> None:
        spec = mujoco.MjSpec.from_string(env.look)
        defaults = mujoco.MjSpec().visual
        spec.visual.quality.offsamples = defaults.quality.offsamples
        spec.visual.quality.shadowsize = defaults.quality.shadowsize
        spec.visual.global_.offwidth = defaults.global_.offwidth
        spec.visual.global_.offheight = defaults.global_.offheight
        for light in spec.lights:
            light.castshadow = True
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.renderer = mujoco.Renderer(self.model, env.image_size, env.image_size)

    def render(self, env: Env) -> np.ndarray:
        """The environment's present state, (image_size, image_size, 3) uint8."""
        self.model.geom_rgba[:] = env.model.geom_rgba
        self.data.qpos[:] = env.data.qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        self.renderer.update_scene(self.data, camera="top")
        return self.renderer.render()


def steps_per_second(suite: str, image_size: int, default_renderer: bool, seconds: float) -> float:
    """Control steps, each with a rendered frame, per second of one process."""
    env = fullest_env(suite, image_size)
    slow = DefaultRenderer(env) if default_renderer else None
    env.observe_pixels = slow is None
    env.action_space.seed(0)
    env.reset(seed=0)
    num_steps, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        if num_steps % EPISODE_STEPS == 0:
            env.reset(seed=num_steps)
        env.step(env.action_space.sample())
        if slow is not None:
            slow.render(env)
        num_steps += 1
    if slow is not None:
        slow.renderer.close()
    return num_steps / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description="Rendered environment steps per second.")
    parser.add_argument("--suites", nargs="+", default=["tabletop"], choices=["tabletop", "gripper"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="image sizes in pixels")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    arguments = parser.parse_args()
    print("suite     image_size  ours (steps/s)  MuJoCo's defaults (steps/s)  ratio")
    for suite in arguments.suites:
        for image_size in arguments.sizes:
            ours = steps_per_second(suite, image_size, False, arguments.seconds)
            default = steps_per_second(suite, image_size, True, arguments.seconds)
            print(f"{suite:8s}  {image_size:10d}  {ours:14.0f}  {default:27.1f}  {ours / default:5.1f}")


if __name__ == "__main__":
    main()
