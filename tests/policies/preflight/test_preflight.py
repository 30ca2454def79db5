import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from envs import demos
from envs.policy_folder import PolicyFolder
from lapa.checkpoint import read_json
from lapa.schema import DemosConfig, FinetuneConfig, PreflightConfig, Runtime, Training, WordText
from policies import finetune
from policies.preflight import open_loop, preflight
from policies.preflight.recording import read_recording
from policies.serving.served_policy import ServedPolicy
from tests.lapa.latent_vla.test_pretrain import BACKBONE
from tests.policies.preflight.conftest import CAMERA, LENGTH, good_episodes, write_robot_data

RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)
DATA_CHECKS = ["features", "units", "timing", "images"]
CHUNK_SIZE = 6


def run(data: Path, tmp_path: Path, checks: list[str], **options) -> dict[str, list[tuple[str, str]]]:
    """(status, message) of every finding, by check; the stage must fail exactly where one of them does."""
    config = PreflightConfig(
        output_dir=str(tmp_path / "preflight"), data=str(data), checks=checks, runtime=RUNTIME, **options
    )
    try:
        preflight.run(config)
        failed = False
    except ValueError as error:
        if "checks failed" not in str(error):
            raise
        failed = True
    report = read_json(tmp_path / "preflight" / "preflight.json")
    assert failed == any(finding["status"] == "fail" for finding in report["findings"])
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["check"], []).append((finding["status"], finding["message"]))
    return found


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return write_robot_data(tmp_path_factory.mktemp("good"), good_episodes(), monkeypatch)


@pytest.fixture(scope="module")
def policy(tmp_path_factory, good) -> Path:
    """Finetuned on all but the last two episodes."""
    folder = tmp_path_factory.mktemp("policy") / "policy"
    finetune.run(
        FinetuneConfig(
            output_dir=str(folder),
            data=str(good),
            backbone=BACKBONE,
            text=WordText(),
            image_size=32,
            random_shift_pixels=0,
            chunk_size=CHUNK_SIZE,
            num_episodes=4,
            training=Training(num_steps=300, batch_size=16, learning_rate=4e-3, warmup_steps=5, tensorboard=False),
            runtime=RUNTIME,
        )
    )
    return folder


def test_good_data_pass(good, tmp_path):
    found = run(good, tmp_path, DATA_CHECKS)
    assert {status for findings in found.values() for status, _ in findings} == {"pass"}
    assert "actions are positions" in str(found["units"])
    assert "follows the action by 2 frames (0.20 s)" in str(found["timing"])


def spoil_units(episodes):
    episodes.actions = [np.rad2deg(actions) for actions in episodes.actions]


def spoil_copied_state(episodes):
    episodes.actions = [states.copy() for states in episodes.states]


def spoil_order(episodes):
    episodes.actions = [np.concatenate([states[:1], states[:1], states[:-2]]) for states in episodes.states]


def spoil_gripper(episodes):
    for states, actions in zip(episodes.states, episodes.actions, strict=True):
        states[:, 2] = actions[:, 2] = 0.5


def spoil_glitch(episodes):
    rng = np.random.default_rng(0)
    # Many episodes, so that one glitch is rare.
    for _ in range(40):
        episodes.states.append(episodes.states[0])
        episodes.actions.append(episodes.actions[0] + rng.normal(0, 1e-4, episodes.actions[0].shape))
        episodes.frames.append(episodes.frames[0])
    episodes.actions[3] = episodes.actions[3].copy()
    episodes.actions[3][10, 0] = 2.0


def make_displacements(episodes):
    episodes.actions = [np.diff(np.concatenate([states, states[-1:]]), axis=0) for states in episodes.states]


def spoil_black(episodes):
    episodes.frames[0][:] = 0


def spoil_frozen(episodes):
    episodes.frames[0][:] = episodes.frames[0][0]


@pytest.mark.parametrize(
    ("spoil", "check", "status", "message"),
    [
        (spoil_units, "units", "fail", "degrees for radians"),
        (spoil_copied_state, "units", "warn", "copies the state"),
        (spoil_gripper, "units", "warn", "gripper that never moves"),
        (spoil_glitch, "units", "warn", "jumps by more than half"),
        (make_displacements, "units", "pass", "displacements"),
        (spoil_order, "timing", "warn", "ahead of the action"),
        (spoil_black, "images", "fail", "black"),
        (spoil_frozen, "images", "fail", "frozen"),
    ],
)
def test_what_a_low_loss_hides_is_found(tmp_path, monkeypatch, spoil, check, status, message):
    episodes = good_episodes(3)
    spoil(episodes)
    data = write_robot_data(tmp_path / "data", episodes, monkeypatch)
    found = run(data, tmp_path, [check])
    assert [(s, text) for s, text in found[check] if s == status and message in text], found


def change_rows(data: Path, change) -> None:
    """Edit the rows of a converted data set behind its back."""
    path = next((data / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    rows = table.to_pydict()
    change(rows)
    pq.write_table(pa.table(rows, schema=table.schema), path)


def test_time_that_goes_back_and_missing_numbers_fail(tmp_path, monkeypatch):
    data = write_robot_data(tmp_path / "data", good_episodes(2), monkeypatch)

    def spoil(rows: dict) -> None:
        rows["timestamp"][7], rows["timestamp"][8] = rows["timestamp"][8], rows["timestamp"][7]
        rows["action"][LENGTH + 3][1] = float("nan")

    change_rows(data, spoil)
    found = run(data, tmp_path, ["units", "timing"])
    assert ("fail" in dict(found["timing"])) and "episode 0 goes back at frame 8" in str(found["timing"])
    assert f"first in row {LENGTH + 3}" in str(found["units"])


def test_damaged_video_is_told(tmp_path, monkeypatch):
    data = write_robot_data(tmp_path / "data", good_episodes(2), monkeypatch)
    video = next((data / "videos").rglob("*.mp4"))
    content = bytearray(video.read_bytes())
    content[40 : len(content) // 2] = bytes(len(content) // 2 - 40)
    video.write_bytes(content)
    found = run(data, tmp_path, ["images"])
    assert "fail" in dict(found["images"])


def test_policy_that_sees_the_task_beats_both_baselines_on_episodes_it_never_saw(good, policy, tmp_path):
    found = run(good, tmp_path, ["features", "units", "open_loop"], policy=str(policy))
    assert [status for status, _ in found["open_loop"]] == ["pass"], found
    assert "episodes [4, 5]" in str(found["open_loop"])
    assert sorted(p.name for p in (tmp_path / "preflight" / "open_loop").iterdir()) == [
        "episode_000004.png",
        "episode_000005.png",
    ]


def test_policy_of_random_weights_fails_in_open_loop(good, policy, tmp_path):
    random = tmp_path / "random"
    random.mkdir()
    for file in policy.iterdir():
        if file.is_file():
            (random / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    weights = {name: torch.randn_like(value) * 0.3 for name, value in load_file(policy / "model.safetensors").items()}
    save_file(weights, random / "model.safetensors")
    found = run(good, tmp_path, ["open_loop"], policy=str(random))
    assert [status for status, _ in found["open_loop"]] == ["fail"]


def edited_statistics(policy: Path, folder: Path, edit) -> Path:
    """The policy with other statistics in its processors."""
    folder.mkdir()
    for file in policy.iterdir():
        if not file.is_file():
            continue
        if file.name.startswith("policy_") and file.suffix == ".safetensors":
            save_file(edit(load_file(file)), folder / file.name)
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_statistics_of_another_unit_fail(good, policy, tmp_path):
    degrees = edited_statistics(policy, tmp_path / "degrees", lambda stats: {k: v / 57.3 for k, v in stats.items()})
    found = run(good, tmp_path, ["units"], policy=str(degrees))
    assert "fail" in dict(found["units"])
    assert "degrees for radians" in str(found["units"])


def test_missing_statistics_fail(good, policy, tmp_path):
    bare = edited_statistics(
        policy, tmp_path / "bare", lambda stats: {"other.mean": torch.zeros(1), "other.std": torch.ones(1)}
    )
    found = run(good, tmp_path, ["units"], policy=str(bare))
    assert "no statistics ['mean', 'std'] of action" in str(found["units"])
    with pytest.raises(ValueError, match="wrong units"):
        ServedPolicy(bare, torch.device("cpu"))
    with pytest.raises(ValueError, match="wrong units"):
        PolicyFolder(bare, "cpu", 32)


def test_camera_of_another_name_fails_until_it_is_mapped(good, policy, tmp_path):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for file in policy.iterdir():
        if file.suffix == ".json":
            (renamed / file.name).write_text(file.read_text().replace(CAMERA, "observation.images.top"))
        elif file.is_file():
            (renamed / file.name).write_bytes(file.read_bytes())
    found = run(good, tmp_path, ["features", "open_loop"], policy=str(renamed))
    assert "observation.images.top" in str(found["features"])
    assert [status for status, _ in found["open_loop"]] == ["skip"]
    mapped = run(
        good, tmp_path, ["features", "open_loop"], policy=str(renamed), rename_map={CAMERA: "observation.images.top"}
    )
    assert [status for status, _ in mapped["open_loop"]] == ["pass"]


def test_errors_are_those_of_the_definition(good):
    recording = read_recording(good)
    recorded = recording.actions[recording.rows(0)]
    scale = open_loop.Scale(recorded.mean(0), np.array([0.5, 2.0, 0.0]))
    numbers = np.arange(0, LENGTH, 3)
    ahead = np.minimum(numbers[:, None] + np.arange(4), LENGTH - 1)
    chunks = recorded[ahead] + np.array([0.5, 1.0, 9.0])
    found = open_loop.summary(open_loop.compare(recording, {0: (numbers, chunks)}, scale))
    # One standard deviation of the first, half a one of the second; the third never moved in training.
    assert found["policy"]["error"] == pytest.approx(0.75)
    assert found["num_frames"] == len(numbers) - 1
    first_step = (np.abs(recorded[numbers[1:]] - recorded[numbers[1:] - 1])[:, :2] / [0.5, 2.0]).mean()
    assert found["hold_last_action"]["by_step"][0] == pytest.approx(first_step, abs=1e-4)
    assert (
        found["minus_mean_action"]["low"] <= found["minus_mean_action"]["value"] <= found["minus_mean_action"]["high"]
    )


def overfit_training(num_steps: int) -> Training:
    return Training(num_steps=num_steps, batch_size=12, learning_rate=4e-3, warmup_steps=5, tensorboard=False)


def test_a_policy_that_reads_its_last_action_is_told_the_recorded_one(good):
    recording = read_recording(good)
    reading = open_loop.Reading({CAMERA: (3, 32, 32), "action": (3,)}, {}, 4, 3)
    seen = [(numbers, batch["action"]) for numbers, batch in open_loop.observations(recording, reading, 1)]
    numbers, told = np.concatenate([n for n, _ in seen]), torch.cat([actions for _, actions in seen])
    recorded = recording.actions[recording.rows(1)]
    assert told.shape == (len(numbers), 1, 3) and numbers.tolist() == list(range(0, LENGTH, 4))
    assert np.allclose(told[1:, 0], recorded[numbers[1:] - 1]), "and never the one that it shall predict"


def test_a_fresh_policy_learns_one_good_episode_by_heart(good, policy, tmp_path):
    found = run(good, tmp_path, ["overfit"], policy=str(policy), training=overfit_training(150))
    assert [status for status, _ in found["overfit"]] == ["pass"], found
    assert (tmp_path / "preflight" / "overfit" / "episode_000000.png").is_file()


def test_an_episode_whose_pictures_say_nothing_cannot_be_learned(policy, tmp_path, monkeypatch):
    episodes = good_episodes(1)
    episodes.frames[0][:] = episodes.frames[0][0]
    data = write_robot_data(tmp_path / "data", episodes, monkeypatch)
    found = run(data, tmp_path, ["overfit"], policy=str(policy), training=overfit_training(60))
    assert [status for status, _ in found["overfit"]] != ["pass"], found


def test_demonstrations_replay_in_the_simulation_they_came_from(tmp_path):
    made = tmp_path / "made"
    demos.run(DemosConfig(output_dir=str(made), num_episodes=2, image_size=32, video=False, num_workers=1))
    found = run(made / "demos", tmp_path, ["replay"])
    assert [status for status, _ in found["replay"]] == ["pass"], found

    def spoil(rows: dict) -> None:
        rows["action"] = [[1.3 * number for number in action] for action in rows["action"]]

    change_rows(made / "demos", spoil)
    found = run(made / "demos", tmp_path, ["replay"])
    assert [status for status, _ in found["replay"]] == ["fail"]


def test_data_of_an_unknown_robot_are_not_replayed(good, tmp_path):
    found = run(good, tmp_path, ["replay"])
    assert [status for status, _ in found["replay"]] == ["skip"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checks": ["luck"]}, "expected some of"),
        ({"checks": ["open_loop"], "episodes": [9]}, "0 to 5"),
        ({"checks": ["overfit"], "overfit_episode": 6}, "0 to 5"),
        ({"checks": [], "frame_stride": 0}, "frame_stride is 0"),
    ],
)
def test_wrong_options_are_refused(good, policy, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(good, tmp_path, **({"policy": str(policy)} | options))


def test_v21_is_sent_to_convert(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v2.1"}))
    with pytest.raises(ValueError, match="lapa convert"):
        run(tmp_path, tmp_path, ["features"])
