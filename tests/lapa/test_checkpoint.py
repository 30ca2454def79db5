import pytest
import torch

from lapa.checkpoint import load_config, load_weights, read_json, save_model, write_json
from lapa.schema import from_dict


def test_model_folder_round_trip_is_exact(tmp_path):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_model(tmp_path, model.state_dict(), {"name": "toy"})
    load_weights(tmp_path, other)
    assert torch.equal(model.weight, other.weight)
    assert load_config(tmp_path, "pretrain") == {"name": "toy"}


def test_weights_of_another_model_are_refused(tmp_path):
    save_model(tmp_path, torch.nn.Linear(3, 2).state_dict(), {})
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(tmp_path, torch.nn.Linear(4, 2))


def test_missing_folder_names_the_stage_that_writes_it(tmp_path):
    with pytest.raises(ValueError, match="lapa label"):
        load_config(tmp_path / "absent", "label")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}


def test_saved_configuration_cannot_name_anything_but_our_own_choices():
    with pytest.raises(ValueError, match=r"unknown backbone 'os.system'.*dense"):
        from_dict("backbone", {"name": "os.system"})
    with pytest.raises(ValueError, match="does not take"):
        from_dict("backbone", {"name": "dense", "depth": 3})
