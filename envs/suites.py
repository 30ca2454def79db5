"""Simulated suites: what each must offer, the list of them, and which tasks an option `env` means.

    env=tabletop    env=metaworld/push-v3,reach-v3    env=metaworld/mt10    (a suite; some of its tasks; a group)

A suite is a module of this package that is loaded when it is asked for. To add one: a module with what `Suite` lists,
environments with what `SuiteEnv` lists, and a line in SUITES.
"""

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat

import numpy as np
from gymnasium import spaces

SUITES = {
    "tabletop": "envs.tabletop_suite",
    "gripper": "envs.gripper.suite",
    "metaworld": "envs.metaworld_suite",
    "aloha": "envs.aloha_suite",
    "pusht": "envs.pusht_suite",
    "libero": "envs.libero_suite",
}


class SuiteEnv(Protocol):
    """A gymnasium.Env with one camera, as every suite makes it.

    Observation: {"pixels": (S, S, 3) uint8, "agent_pos": (state_dim,) float32}, what the robot knows of itself alone.
    Action: float32 within the bounds of `action_space`, which are physical; `step` clips to them.
    The same seed and actions give the same frames and states, whatever the environment did before.
    """

    metadata: dict[str, Any]  # render_fps: control steps per second, a whole number
    action_space: spaces.Box
    observation_space: spaces.Dict
    _max_episode_steps: int

    @property
    def task(self) -> str:
        """One of the suite's tasks, by which episodes are grouped."""

    @property
    def instruction(self) -> str:
        """Of the present episode."""

    @property
    def task_description(self) -> str:
        """The same under LeRobot's name."""

    @property
    def robot_type(self) -> str:
        """The body's name in data sets."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict[str, Any]]:
        """Observation, and info with is_success and instruction."""

    def step(self, action: np.ndarray) -> tuple[dict, SupportsFloat, bool, bool, dict[str, Any]]:
        """As gymnasium's; info also has is_success, instruction and executed_action, the action after clipping.

        Success ends the episode (terminated), the step limit truncates it.
        """

    def render(self) -> np.ndarray:
        """The camera's frame, (S, S, 3) uint8."""

    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now, from the true state; only in suites with HAS_EXPERT."""


class Suite(Protocol):
    """What the module of a suite offers. Loading it needs none of the suite's own packages."""

    TASKS: tuple[str, ...]
    DEFAULT_TASKS: tuple[str, ...]  # what the suite's name alone means
    GROUPS: dict[str, tuple[str, ...]]  # names for several tasks
    # Those of OPTIONS below that the suite understands. Any other must be left at its default.
    UNDERSTOOD: frozenset[str]
    STATE_NAMES: tuple[str, ...]
    ACTION_NAMES: tuple[str, ...]
    HAS_EXPERT: bool

    def make_env(self, task: str, image_size: int, **options: Any) -> SuiteEnv:
        """An environment of one task; options are those of ENV_OPTIONS that the suite understands.

        Raises ValueError with the install command where the suite's packages are missing.
        """


# Options of the stages that only some suites understand: for making an environment, and for what is done with it.
ENV_OPTIONS = ("split", "variant", "num_blocks_min", "num_blocks_max", "play", "action_repeat")
OPTIONS = (*ENV_OPTIONS, "families", "action_noise_m", "action_noise_share")


@dataclass(frozen=True)
class Body:
    """What a data set says of the robot."""

    robot_type: str
    control_hz: int
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]


def load_suite(name: str) -> Suite:
    """The suite's module; ValueError for an unknown name."""
    if name not in SUITES:
        raise ValueError(f"env is {name!r}, expected one of {list(SUITES)}, with tasks after a slash: suite/task,task")
    module: Any = importlib.import_module(SUITES[name])
    return module


def choose(cfg) -> tuple[str, tuple[str, ...]]:
    """Name of the suite and its tasks that a stage's options mean: env, and for the tabletop suite families.

    Raises:
        ValueError: for an unknown suite or task, or an option set that the suite does not understand.
    """
    name, _, wanted = cfg.env.partition("/")
    suite = load_suite(name)
    understood = set(suite.UNDERSTOOD)
    if wanted:
        understood.discard("families")  # env names the tasks
    refuse_foreign_options(cfg, name, understood)
    if "families" in understood:
        if not cfg.families:
            raise ValueError(f"families is empty, expected some of {list(suite.TASKS)}")
        wanted = ",".join(cfg.families)
    return name, choose_tasks(name, wanted)


def choose_tasks(name: str, wanted: str) -> tuple[str, ...]:
    """The tasks of a suite that `wanted` means: tasks and groups, separated by commas; ValueError for unknown ones."""
    suite = load_suite(name)
    if not wanted:
        return suite.DEFAULT_TASKS
    words = [word.strip() for word in wanted.split(",")]
    unknown = [word for word in words if word not in suite.TASKS and word not in suite.GROUPS]
    if unknown:
        groups = f", or groups of them, {list(suite.GROUPS)}" if suite.GROUPS else ""
        raise ValueError(f"{name} has no task {unknown}, expected some of {list(suite.TASKS)}{groups}")
    # Each once, in the order in which they are named.
    return tuple(dict.fromkeys(task for word in words for task in suite.GROUPS.get(word, (word,))))


def refuse_foreign_options(cfg, name: str, understood: set[str]) -> None:
    """ValueError where an option that the suite does not understand differs from its default."""
    for field in dataclasses.fields(cfg):
        if field.name not in OPTIONS or field.name in understood:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if (value := getattr(cfg, field.name)) != default:
            raise ValueError(f"{field.name} is {value!r}, which env={cfg.env} ignores: leave it at {default!r}")


def make_env(name: str, task: str, image_size: int, options: Any) -> SuiteEnv:
    """An environment; of the attributes of `options`, the ones that the suite understands count."""
    suite = load_suite(name)
    understood = {
        option: getattr(options, option)
        for option in ENV_OPTIONS
        if option in suite.UNDERSTOOD and hasattr(options, option)
    }
    return suite.make_env(task, image_size, **understood)


def body_of(name: str, env: SuiteEnv) -> Body:
    """The description of the robot in `env`, of the suite `name`."""
    suite = load_suite(name)
    return Body(env.robot_type, env.metadata["render_fps"], suite.STATE_NAMES, suite.ACTION_NAMES)
