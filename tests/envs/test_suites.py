import subprocess
import sys

import pytest

from envs.suites import SUITES, choose, choose_tasks, load_suite
from lapa.schema import DemosConfig, EvaluateConfig


def test_tasks_are_named_in_families_or_in_env():
    assert choose(EvaluateConfig(families=["reach", "separate_blocks"])) == ("tabletop", ("reach", "separate_blocks"))
    assert choose(EvaluateConfig(env="tabletop/separate_blocks,reach")) == ("tabletop", ("separate_blocks", "reach"))


@pytest.mark.parametrize("name", SUITES)
def test_suites_load_without_their_simulator_and_say_what_they_have(name):
    suite = load_suite(name)
    assert choose_tasks(name, "") == suite.DEFAULT_TASKS
    assert set(suite.DEFAULT_TASKS) <= set(suite.TASKS)
    for group, tasks in suite.GROUPS.items():
        assert choose_tasks(name, group) == tasks and set(tasks) <= set(suite.TASKS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"env": "moon"}, "env is 'moon', expected one of"),
        ({"env": "tabletop/fly"}, r"tabletop has no task \['fly'\]"),
        ({"families": []}, "families is empty"),
        ({"env": "tabletop/reach", "families": ["separate_blocks"]}, "families is .* leave it at"),
        ({"action_noise_share": 0.2}, "env=tabletop ignores"),
    ],
)
def test_what_a_suite_does_not_understand_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        choose(DemosConfig(**options))


def test_importing_the_registry_loads_no_simulator():
    code = "import sys, envs.suites; assert not {'mujoco', 'torch', 'lerobot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
