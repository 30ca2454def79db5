import torch

from lapa.backbones.byte_entropy import ByteModel, train_byte_model
from lapa.backbones.patchers import encode_bytes

TEXTS = [f"{verb} the {block}" for verb in ("push", "reach") for block in ("red moon", "blue cube", "green star")]


def new_model(seed: int = 0) -> ByteModel:
    torch.manual_seed(seed)
    return ByteModel(32, 1, 2)


def test_entropies_do_not_depend_on_the_other_rows():
    model = new_model().eval()
    ids_BS = encode_bytes([*TEXTS, "a much longer row beside them, with OTHER bytes"], 60)
    together_BS = model.entropies(ids_BS)
    for row, text in enumerate(TEXTS):
        alone_BS = model.entropies(encode_bytes([text], len(text)))
        torch.testing.assert_close(together_BS[row : row + 1, : len(text) + 1], alone_BS)


def test_an_entropy_is_of_the_future_given_the_past():
    model = new_model().eval()
    one_BS, other_BS = model.entropies(encode_bytes(["push it", "push us"], 8))
    torch.testing.assert_close(one_BS[:6], other_BS[:6])
    assert not torch.allclose(one_BS[6], other_BS[6])


def test_entropies_are_nats_and_the_same_under_autocast():
    model = new_model()
    with torch.no_grad():
        model.head.weight.zero_()
    ids_BS = encode_bytes(["go"], 3)
    torch.testing.assert_close(model.entropies(ids_BS), torch.full((1, 4), torch.tensor(260.0).log().item()))
    other = new_model(1)
    expected_BS = other.entropies(ids_BS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other.entropies(ids_BS), expected_BS)


def test_a_trained_model_is_unsure_where_texts_part_and_sure_within_words():
    model = new_model()
    loss = train_byte_model(model, encode_bytes(TEXTS, 30), num_steps=120, seed=0)
    assert loss < 0.6
    text = "push the red moon"
    entropy_S = model.entropies(encode_bytes([text], 30))[0]
    unsure, sure = text.index("red"), text.index("ush")  # byte t of the text is predicted at t of the ids
    assert entropy_S[unsure] > 0.8 and entropy_S[sure] < 0.4


def test_training_repeats_by_its_seed_and_freezes_the_model():
    ids_BS = encode_bytes(TEXTS, 30)
    models = []
    for seed in (0, 0, 1):
        models.append(new_model())
        train_byte_model(models[-1], ids_BS, num_steps=3, seed=seed)
    weights = [model.head.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not any(p.requires_grad or p.grad is not None for p in models[0].parameters())
