import subprocess
import sys

import numpy as np
import pytest

import envs.rendering
from envs.tabletop import TabletopEnv


def visible_width(env, body):
    """Pixels that change when the body is moved out of sight, as the side of a square of that area."""
    env.reset(seed=0)
    shown = env.render().astype(int)
    joint = 0 if body == "tip" else 2
    env.data.qpos[joint] += 10
    changed = np.abs(env.render().astype(int) - shown).max(-1) > 30
    return np.sqrt(changed.sum())


@pytest.mark.parametrize("body", ["tip", "block"])
def test_tip_and_blocks_span_six_to_nine_pixels_at_64(body):
    assert 5.5 <= visible_width(TabletopEnv("reach", num_blocks=1), body) <= 9.5


def test_an_action_of_three_centimetres_moves_the_tip_three_pixels():
    env = TabletopEnv("reach", num_blocks=1)
    env.reset(seed=3)
    first = env.render()
    env.step(np.array([0.03, 0.0]))
    dark = [np.argwhere(frame.max(-1) < 60).mean(0) for frame in (first, env.render())]
    np.testing.assert_allclose(dark[1] - dark[0], [0, 3], atol=0.5)


@pytest.fixture
def fresh_backend(monkeypatch):
    """As if MuJoCo was not imported yet and the user had set nothing."""
    monkeypatch.delitem(sys.modules, "mujoco")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    return monkeypatch


def chosen():
    envs.rendering.choose_backend()
    return envs.rendering.os.environ.get("MUJOCO_GL")


def test_the_users_backend_is_kept(fresh_backend):
    fresh_backend.setenv("MUJOCO_GL", "glfw")
    assert chosen() == "glfw"


def test_osmesa_is_taken_where_egl_is_missing(fresh_backend):
    fresh_backend.setattr(envs.rendering, "egl_has_device", lambda: False)
    fresh_backend.setattr(envs.rendering, "osmesa_loads", lambda: True)
    assert chosen() == "osmesa"


def test_missing_libraries_are_named(fresh_backend):
    fresh_backend.setattr(envs.rendering, "egl_has_device", lambda: False)
    fresh_backend.setattr(envs.rendering, "osmesa_loads", lambda: False)
    with pytest.raises(ImportError, match=r"libegl1.*libosmesa6"):
        chosen()


def test_importing_the_package_loads_neither_mujoco_nor_torch():
    code = "import sys, envs; sys.exit(bool({'mujoco', 'torch', 'OpenGL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_process_that_never_closes_its_environment_exits_quietly():
    code = "import gymnasium, envs; gymnasium.make('tabletop/Reach-v0').reset(seed=0)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""
