import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from envs import libero_suite
from envs.libero_env import import_libero, rotation_vector


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for hf-libero that asks on the terminal when its configuration is missing, as the real one does."""
    root = tmp_path / "site" / "libero" / "libero"
    (root / "envs").mkdir(parents=True)
    (root / "benchmark").mkdir()
    (root.parent / "__init__.py").write_text("")
    (root / "__init__.py").write_text(
        "import json, os\n"
        "path = os.path.join(os.environ.get('LIBERO_CONFIG_PATH', os.path.expanduser('~/.libero')), 'config.yaml')\n"
        "if not os.path.exists(path):\n"
        "    input('Do you want to specify a custom path?')\n"
        "def get_libero_path(key):\n"
        "    return json.load(open(path))[key]\n"
    )
    (root / "benchmark" / "__init__.py").write_text(
        "from types import SimpleNamespace\n"
        "class Goal:\n"
        "    def get_task(self, index):\n"
        "        names = {'problem_folder': 'libero_goal', 'bddl_file': f'{index}.bddl'}\n"
        "        return SimpleNamespace(language=f'do {index}', **names)\n"
        "def get_benchmark_dict():\n"
        "    return {'libero_goal': Goal}\n"
    )
    (root / "envs" / "__init__.py").write_text("from stand_in import OffScreenRenderEnv\n")

    class OffScreenRenderEnv:
        def __init__(self, **options):
            self.options = options

        def seed(self, seed):
            np.random.seed(seed)  # noqa: NPY002

        def reset(self):
            self.steps, self.place = 0, np.random.rand(3)  # noqa: NPY002
            return self.observe()

        def step(self, action):
            self.steps += 1
            return self.observe(), 0.0, False, {}

        def check_success(self):
            return self.steps >= 13

        def observe(self):
            frame = np.zeros((32, 32, 3), np.uint8)
            frame[0, 0] = 255
            return {
                "agentview_image": frame,
                "robot0_eef_pos": self.place,
                "robot0_eef_quat": np.array([0, 0, 1.0, 0]),
                "robot0_gripper_qpos": np.array([0.04, -0.04]),
            }

    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(OffScreenRenderEnv=OffScreenRenderEnv))
    monkeypatch.syspath_prepend(str(root.parent.parent))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked: {question}"))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    for name in [name for name in sys.modules if name == "libero" or name.startswith("libero.")]:
        monkeypatch.delitem(sys.modules, name)
    yield root
    for name in [name for name in sys.modules if name == "libero" or name.startswith("libero.")]:
        del sys.modules[name]
    os.environ.pop("LIBERO_CONFIG_PATH", None)


def test_missing_package_is_told_with_the_install_command():
    with pytest.raises(ValueError, match=r"pip install 'lerobot_policy_lapa\[libero\]'"):
        import_libero()


def test_missing_assets_are_told_before_anything_is_imported_or_downloaded(package):
    with pytest.raises(ValueError, match=r"assets are in none of .*download_assets_from_huggingface"):
        libero_suite.make_env("libero_goal-3", 32)
    assert "libero.libero" not in sys.modules


def test_nothing_is_asked_and_episodes_follow_the_contract(package):
    (package / "assets" / "stable_scanned_objects").mkdir(parents=True)
    env = libero_suite.make_env("libero_goal-3", 32)
    assert env._simulation.options["bddl_file_name"] == str(package / "bddl_files/libero_goal/3.bddl")
    assert (env.task, env.instruction, env._max_episode_steps) == ("libero_goal-3", "do 3", 300)
    starts = [env.reset(seed=seed)[0] for seed in (1, 2, 1)]
    np.testing.assert_array_equal(starts[0]["agent_pos"], starts[2]["agent_pos"])
    assert not np.array_equal(starts[0]["agent_pos"], starts[1]["agent_pos"])
    assert starts[0]["pixels"][-1, -1].tolist() == [255, 255, 255]  # upright
    ends = [env.step(np.zeros(7))[-1]["is_success"] for _ in range(3)]
    assert ends == [False, False, True]


def test_rotation_vector_of_known_turns():
    np.testing.assert_allclose(rotation_vector(np.array([0, 0, 0, 1.0])), [0, 0, 0])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(rotation_vector(np.array([half, 0, 0, half])), [np.pi / 2, 0, 0])
