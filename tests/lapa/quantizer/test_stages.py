import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.checkpoint import write_tensors
from lapa.data import FramePairs, frame_gap, read_store, to_float
from lapa.quantizer import evaluate_quantizer, label, train_quantizer
from lapa.quantizer.base import load_quantizer, quantizer_pairs
from lapa.quantizer.evaluation import check_gate, require_gate
from lapa.quantizer.label import load_labels
from lapa.schema import (
    ConvolutionalQuantizer,
    EvaluateQuantizerConfig,
    FSQCodebook,
    LabelConfig,
    MixturePart,
    PairData,
    QuantizerGate,
    Runtime,
    Training,
    TrainQuantizerConfig,
)

CPU = Runtime(device="cpu", dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def trained(moving_discs, tmp_path_factory):
    """A quantizer trained for a few steps, its folder and what the stage returned."""
    folder = tmp_path_factory.mktemp("quantizer")
    config = TrainQuantizerConfig(
        output_dir=str(folder),
        data=PairData(path=str(moving_discs), frame_gap_s=0.2, holdout_fraction=0.25),
        model=ConvolutionalQuantizer(image_size=32, width=8, latent_dim=8, num_keypoints=8),
        codebook=FSQCodebook(code_length=2, codebook_size=4),
        training=Training(num_steps=60, batch_size=16, checkpoint_every_steps=50, tensorboard=False),
        runtime=CPU,
    )
    return folder, train_quantizer.run(config), config


@pytest.fixture(scope="module")
def labelled(trained, moving_discs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    config = LabelConfig(
        quantizer=str(trained[0]), data=str(moving_discs), output_dir=str(folder), batch_size=7, runtime=CPU
    )
    return folder, label.run(config), config


def test_training_writes_a_complete_folder(trained):
    folder, result, _ = trained
    config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    assert config["frame_gap_frames"] == 2 and config["frame_gap_s"] == pytest.approx(0.2)
    assert config["image_size"] == 32 and config["fps"] == 10
    assert {"linear_probe_r2", "delta_psnr_db", "perplexity_ratio", "present_frame_probe_r2"} <= metrics.keys()
    assert metrics["gate"] == {"passed": result["gate_passed"], "reasons": metrics["gate"]["reasons"]}
    for name in ("gallery", "transfer", "reconstructions", "usage", "arrows"):
        assert (folder / "images" / f"{name}.png").stat().st_size > 1000
    assert not (folder / "checkpoint").exists()


def evaluation(trained, data, folder, **changes):
    config = EvaluateQuantizerConfig(quantizer=str(trained[0]), data=str(data), output_dir=str(folder), runtime=CPU)
    return evaluate_quantizer.run(replace(config, **changes))


def test_evaluating_on_the_training_data_repeats_the_metrics_of_training(trained, moving_discs, tmp_path):
    folder, result, _ = trained
    assert evaluation(trained, moving_discs, tmp_path) == result
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((folder / "metrics.json").read_text())
    rows = (tmp_path / "codes.csv").read_text().splitlines()
    assert rows == (folder / "codes.csv").read_text().splitlines()
    assert rows[0] == "code,count,share,mean_0,standard_deviation_0,mean_1,standard_deviation_1"


def test_a_mixture_of_one_trains_the_same_quantizer_and_one_of_two_remembers_what_it_held_out(
    trained, moving_discs, other_discs, tmp_path, monkeypatch
):
    config = replace(trained[2], training=Training(num_steps=2, batch_size=16, tensorboard=False), num_eval_pairs=32)
    paths = [str(moving_discs), str(other_discs)]
    parts = [MixturePart(path=path, weight=weight) for path, weight in zip(paths, (1.0, 2.0), strict=True)]
    runs = {"plain": config.data, "one": replace(config.data, path=None, mixture=parts[:1])}
    runs["two"] = replace(config.data, path=None, mixture=parts)
    for name, data in runs.items():
        with monkeypatch.context() as patch:
            if name != "two":  # the metrics of two runs that are compared by their weights
                patch.setattr(train_quantizer, "measure", lambda *_: {})
            train_quantizer.run(replace(config, output_dir=str(tmp_path / name), data=data))
    plain, one = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "one"))
    assert plain == one

    saved = json.loads((tmp_path / "two" / "config.json").read_text())
    for path, number in zip(paths, (3, 2), strict=True):
        store = read_store(Path(path))
        train, held_out = evaluate_quantizer.choose_episodes(store, saved, "held_out", 0)
        assert len(held_out) == number and sorted([*train, *held_out]) == list(range(store.num_episodes))
        labels = LabelConfig(
            quantizer=str(tmp_path / "two"), data=path, output_dir=str(tmp_path / "labels"), runtime=CPU
        )
        label.run(labels)
        assert load_labels(tmp_path / "labels", store).frame_gap_frames == 2


def test_other_data_is_all_held_out_and_half_of_it_fits_the_probes(trained, moving_discs, other_discs):
    config = json.loads((trained[0] / "config.json").read_text())
    train, held_out = evaluate_quantizer.choose_episodes(read_store(moving_discs), config, "held_out", 0)
    assert held_out.tolist() == config["holdout_episodes"] and len(train) == 9
    other = read_store(other_discs)
    for episodes in ("held_out", "all"):
        fitted_on, measured_on = evaluate_quantizer.choose_episodes(other, config, episodes, 0)
        assert sorted([*fitted_on, *measured_on]) == list(range(10)) and len(measured_on) == 5
    silent = replace(other, actions=None)
    assert len(evaluate_quantizer.choose_episodes(silent, config, "held_out", 0)[1]) == 10
    with pytest.raises(ValueError, match="expected held_out or all"):
        evaluate_quantizer.choose_episodes(other, config, "some", 0)


def test_labels_take_the_gate_from_an_evaluation_of_that_quantizer(trained, moving_discs, other_discs, tmp_path):
    bare = tmp_path / "imported"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((trained[0] / name).read_bytes())
    config = LabelConfig(quantizer=str(bare), data=str(moving_discs), output_dir=str(tmp_path / "labels"), runtime=CPU)
    with pytest.raises(ValueError, match="run `lapa evaluate_quantizer"):
        label.run(config)
    gate = QuantizerGate(min_delta_psnr_db=99.0)
    evaluation((bare,), other_discs, tmp_path / "evaluation", gate=gate)
    label.run(replace(config, evaluation=str(tmp_path / "evaluation")))
    labels = load_labels(tmp_path / "labels", read_store(moving_discs))
    assert not labels.gate["passed"] and any("99.00 dB" in reason for reason in labels.gate["reasons"])

    weights = load_quantizer(trained[0]).state_dict()
    first = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    write_tensors(bare / "model.safetensors", weights | {first: weights[first] + 1})
    with pytest.raises(ValueError, match="of other weights"):
        label.run(replace(config, evaluation=str(tmp_path / "evaluation")))


def test_training_again_gives_the_same_weights(trained, tmp_path):
    folder, _, config = trained
    train_quantizer.run(replace(config, output_dir=str(tmp_path)))
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_pairs_never_cross_clips(moving_discs):
    store = read_store(moving_discs)
    pairs = FramePairs(store, 3, np.array([0, 4]))
    episode = store.episode_of_frame()
    assert set(episode[pairs.first_frames]) == {0, 4}
    assert (episode[pairs.first_frames] == episode[pairs.first_frames + 3]).all()
    assert len(pairs) == 2 * (8 - 3)


def test_labels_belong_to_the_frame_that_starts_the_pair(trained, labelled, moving_discs):
    store = read_store(moving_discs)
    labels = load_labels(labelled[0], store)
    assert labels.latent_action.shape == (store.num_frames, 2) and labels.is_valid.shape == (store.num_frames,)
    assert (labels.is_valid == (store.steps_left() >= 2)).all()
    assert labels.frame_gap_frames == 2 and (labels.code_length, labels.codebook_size) == (2, 4)
    model = load_quantizer(trained[0])
    for frame in (0, 5, 8, 37):
        with torch.no_grad():
            codes, _ = model.encode(to_float(store.frames[[[frame, frame + 2]]]))
        assert (labels.latent_action[frame] == codes[0].numpy()).all()


def test_labelling_twice_gives_the_same_file(labelled, tmp_path):
    folder, result, config = labelled
    assert label.run(replace(config, output_dir=str(tmp_path))) == result
    for name in ("labels.safetensors", "labels.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def relabel(labelled, folder, **changes):
    label.run(replace(labelled[2], output_dir=str(folder), **changes))
    return load_labels(folder, read_store(Path(labelled[2].data)))


def test_shuffled_labels_are_as_frequent_and_belong_to_other_frames(labelled, moving_discs, tmp_path):
    own = load_labels(labelled[0], read_store(moving_discs))
    shuffled = relabel(labelled, tmp_path / "shuffled", source="shuffled")
    assert (shuffled.is_valid == own.is_valid).all() and shuffled.codebook_size == own.codebook_size
    rows = [sorted(map(tuple, labels.latent_action[labels.is_valid])) for labels in (own, shuffled)]
    assert rows[0] == rows[1]
    assert (shuffled.latent_action != own.latent_action).any(1)[own.is_valid].mean() > 0.5
    of_labels = relabel(labelled, tmp_path / "of_labels", source="shuffled", labels=str(labelled[0]))
    assert (of_labels.latent_action == shuffled.latent_action).all()


def test_clusters_have_the_quantizers_vocabulary_and_oracle_codes_tell_the_displacement(
    labelled, moving_discs, tmp_path
):
    store = read_store(moving_discs)
    pairs = FramePairs(store, 2, np.arange(store.num_episodes))
    moved = pairs.displacements(np.arange(len(pairs)))

    def share_told(labels):
        codes = labels.latent_action[pairs.first_frames, 0]
        within = sum(np.square(moved[codes == code] - moved[codes == code].mean(0)).sum() for code in np.unique(codes))
        return 1 - within / np.square(moved - moved.mean(0)).sum()

    oracle = relabel(labelled, tmp_path / "oracle", source="actions", action_data=str(moving_discs))
    pixels = relabel(labelled, tmp_path / "pixels", source="pixel_differences")
    for labels in (oracle, pixels):
        assert (labels.num_codes, labels.codebook_size) == (1, 4**2) and labels.gate["passed"]
        assert labels.latent_action.max() < 16 and len(np.unique(labels.latent_action[labels.is_valid])) > 8
    assert share_told(oracle) > 0.8 > share_told(pixels)
    same = relabel(labelled, tmp_path / "same", source="pixel_differences", labels=str(tmp_path / "pixels"))
    assert (same.latent_action == pixels.latent_action).all()


def test_clusters_of_one_data_set_label_another(labelled, other_discs, tmp_path):
    relabel(labelled, tmp_path / "first", source="pixel_differences")
    options = replace(labelled[2], data=str(other_discs), source="pixel_differences", labels=str(tmp_path / "first"))
    label.run(replace(options, output_dir=str(tmp_path / "second")))
    centres = [load_file(tmp_path / name / "labels.safetensors")["centres"] for name in ("first", "second")]
    assert torch.equal(*centres) and len(centres[0]) == 16
    with pytest.raises(ValueError, match="are of source=quantizer and lack centres, expected those of source=pixel"):
        label.run(replace(options, labels=str(labelled[0]), output_dir=str(tmp_path / "bad")))
    with pytest.raises(ValueError, match=r"no labels.json in .*absent: expected a folder written by `lapa label`"):
        label.run(replace(options, labels=str(tmp_path / "absent"), output_dir=str(tmp_path / "bad")))


def test_a_source_that_is_unknown_or_lacks_its_actions_is_refused(labelled, tmp_path):
    with pytest.raises(ValueError, match=r"source is 'noise', expected one of \['actions'"):
        relabel(labelled, tmp_path, source="noise")
    with pytest.raises(ValueError, match="needs action_data="):
        relabel(labelled, tmp_path, source="actions")


def test_labels_of_other_data_are_refused(labelled, other_discs, tmp_path):
    with pytest.raises(ValueError, match="run `lapa label` on these data"):
        load_labels(labelled[0], read_store(other_discs))
    with pytest.raises(ValueError, match="written by `lapa label`"):
        load_labels(tmp_path, read_store(other_discs))


def test_probe_data_must_hold_the_same_episodes(trained, other_discs, tmp_path):
    config = replace(trained[2], output_dir=str(tmp_path), probe_data=str(other_discs))
    with pytest.raises(ValueError, match="expected the same episodes with actions"):
        train_quantizer.run(config)


GOOD = {
    "num_pairs": 2048.0,
    "perplexity": 40.0,
    "perplexity_ratio": 0.6,
    "perplexity_ceiling": 64.0,
    "vocabulary_utilisation": 1.0,
    "token_utilisation": 0.9,
    "delta_psnr_db": 2.0,
    "psnr_db": 30.0,
    "copy_psnr_db": 25.0,
    "psnr_over_copy_db": 5.0,
    "error_to_future": 0.001,
    "error_to_present": 0.003,
    "linear_probe_r2": 0.8,
    "present_frame_probe_r2": 0.1,
    "latent_gain_r2": 0.7,
    "latent_gain_r2_low": 0.6,
    "latent_gain_r2_high": 0.8,
}


def test_gate_passes_a_good_quantizer():
    assert check_gate(GOOD, QuantizerGate()) == {"passed": True, "reasons": []}


@pytest.mark.parametrize(("gain", "passes"), [(0.2, True), (-0.1, False)])
def test_gate_judges_one_held_out_episode_without_an_interval(gain, passes):
    alone = {name: value for name, value in GOOD.items() if not name.endswith(("_low", "_high"))}
    assert check_gate(alone | {"latent_gain_r2": gain}, QuantizerGate())["passed"] == passes


def test_gate_asks_for_dimensions_where_there_are_no_codes():
    usage = ("perplexity", "perplexity_ratio", "perplexity_ceiling", "vocabulary_utilisation", "token_utilisation")
    continuous = {name: value for name, value in GOOD.items() if name not in usage} | {"num_dimensions": 8.0}
    assert check_gate(continuous | {"active_dimensions": 3.0}, QuantizerGate())["passed"]
    gate = check_gate(continuous | {"active_dimensions": 1.0}, QuantizerGate())
    assert not gate["passed"] and "1 of 8 dimensions" in gate["reasons"][0]


def test_gate_asks_no_more_latent_actions_of_a_large_code_space_than_there_are_pairs():
    large = GOOD | {"perplexity": 400.0, "perplexity_ratio": 400 / 8**6, "perplexity_ceiling": 2048.0}
    assert check_gate(large, QuantizerGate(min_perplexity_ratio=0.1))["passed"]
    assert not check_gate(large, QuantizerGate(min_perplexity_ratio=0.3))["passed"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"perplexity": 1.0, "perplexity_ratio": 1 / 64, "vocabulary_utilisation": 1 / 8}, "collapsed"),
        ({"vocabulary_utilisation": 0.5}, "50% of the codes"),
        ({"token_utilisation": 0.125}, "uses only 12% of its codes"),
        ({"delta_psnr_db": -0.1}, "ignores the latent action"),
        ({"psnr_over_copy_db": -1.0}, "no better than repeating the first frame"),
        ({"error_to_present": 0.0009}, "hardly moves"),
        ({"linear_probe_r2": float("nan")}, "linear_probe_r2 is not a number"),
        ({"latent_gain_r2": 0.01, "latent_gain_r2_low": -0.02}, "that the first frame does not"),
    ],
)
def test_gate_refuses_and_says_why(change, reason):
    gate = check_gate(GOOD | change, QuantizerGate())
    assert not gate["passed"] and any(reason in line for line in gate["reasons"])
    with pytest.raises(ValueError, match=reason):
        require_gate(gate, "a folder")


def test_a_quantizer_that_ignores_its_input_fails_the_gate(trained, moving_discs):
    """One code for everything, measured end to end."""
    from lapa.quantizer.evaluation import evaluate
    from lapa.runtime import setup

    model = load_quantizer(trained[0])
    for parameter in model.inverse_model.parameters():
        parameter.data.zero_()
    store = read_store(moving_discs)
    train, held_out = FramePairs(store, 2, np.arange(9)), FramePairs(store, 2, np.arange(9, 12))
    metrics, _ = evaluate(model, train, held_out, 64, 0, setup(CPU))
    gate = check_gate(metrics, QuantizerGate())
    assert metrics["codes_in_use"] == 1 and not gate["passed"]
    assert any("of the codes of a token" in reason for reason in gate["reasons"])


def test_a_gate_passed_on_the_training_episodes_is_no_gate(trained, moving_discs, tmp_path):
    evaluation(trained, moving_discs, tmp_path / "all", episodes="all")
    config = LabelConfig(quantizer=str(trained[0]), data=str(moving_discs), output_dir=str(tmp_path), runtime=CPU)
    with pytest.raises(ValueError, match="episodes=held_out"):
        label.run(replace(config, evaluation=str(tmp_path / "all")))


def test_probe_data_of_other_videos_is_refused_though_its_episodes_are_as_long(trained, equally_long_discs, tmp_path):
    with pytest.raises(ValueError, match="shows other frames"):
        train_quantizer.run(replace(trained[2], output_dir=str(tmp_path), probe_data=str(equally_long_discs)))


@pytest.mark.parametrize(("gap_s", "gap_frames"), [(0.21, None), (0.21, 4)])
def test_labels_are_made_at_the_gap_of_training_where_frame_rates_differ(moving_discs, gap_s, gap_frames):
    rates = np.array([15.0, 30.0] * 6)
    store = replace(read_store(moving_discs), fps=15.0, episode_fps=rates)
    gap = frame_gap(store, gap_s, gap_frames)
    config = {
        "fps": store.fps,
        "frame_gap_frames": int(gap),
        "frame_gap_s": gap_s if gap_frames is None else gap / store.fps,
        "is_gap_in_frames": gap_frames is not None,
    }
    episodes = np.arange(store.num_episodes)
    trained_on = FramePairs(store, gap, episodes)
    assert quantizer_pairs(store, config, episodes).gaps.tolist() == trained_on.gaps.tolist()
    assert set(trained_on.gaps.tolist()) == ({4} if gap_frames else {3, 6})
