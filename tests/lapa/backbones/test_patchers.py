import pytest
import torch

from lapa.backbones.patchers import (
    boundary_scores,
    choose_theta,
    encode_bytes,
    entropy_starts,
    pack,
    patch_of_byte,
    space_starts,
    static_starts,
    unpack,
)


def patches(text: str, starts_S: torch.Tensor) -> list[str]:
    """The text in pieces; the begin byte is shown as ^."""
    shown, pieces = "^" + text, []
    for character, is_start in zip(shown, starts_S.tolist(), strict=False):
        if is_start:
            pieces.append(character)
        else:
            pieces[-1] += character
    return pieces


def test_a_text_becomes_its_bytes_after_a_begin_byte_and_is_padded_and_cut():
    assert encode_bytes(["ab", "", "é", "abcd"], 3).tolist() == [
        [1, 101, 102, 0],
        [1, 0, 0, 0],
        [1, 0xC3 + 4, 0xA9 + 4, 0],
        [1, 101, 102, 103],
    ]
    assert encode_bytes(["AB"], 2, lower_case=True).tolist() == encode_bytes(["ab"], 2).tolist()


def test_a_space_ends_its_word_and_further_spaces_begin_the_next():
    text = "go  to,the x"
    assert patches(text, space_starts(encode_bytes([text], 20))[0]) == ["^", "go ", " to,", "the ", "x"]


def test_a_character_of_many_bytes_is_not_cut_after_its_first():
    starts_S = space_starts(encode_bytes(["né a"], 8))[0]
    assert starts_S.nonzero().flatten().tolist() == [0, 1, 3, 5]


def test_static_patches_count_from_the_first_byte():
    text = "abcdefgh"
    assert patches(text, static_starts(encode_bytes([text], 20), 3)[0]) == ["^", "abc", "def", "gh"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("global", ["^", "a", "b", "cd", "e", "f"]),  # entropies above 1 after a, b, d and e
        ("monotonic", ["^", "a", "bcd", "ef"]),  # it rises by more than 1 after a and d
        ("combined", ["^", "a", "bcd", "ef"]),  # above 1, and on the rise
    ],
)
def test_rules_of_entropy(rule, expected):
    ids_BS = encode_bytes(["abcdef"], 6)
    entropy_BS = torch.tensor([[0.0, 2.5, 1.5, 0.5, 2.5, 1.2, 9.0]])
    starts_BS = entropy_starts(boundary_scores(entropy_BS, rule), 1.0, ids_BS)
    assert patches("abcdef", starts_BS[0]) == expected


@pytest.mark.parametrize("starts", [space_starts, lambda ids: static_starts(ids, 2)])
def test_the_first_two_starts_are_forced_and_padding_has_none(starts):
    starts_BS = starts(encode_bytes([" a b", "", "a"], 6))
    assert starts_BS[:, :2].tolist() == [[True, True], [True, False], [True, True]]
    assert not starts_BS[1, 1:].any() and not starts_BS[2, 2:].any()


@pytest.mark.parametrize("mean_patch_bytes", [1.0, 2.0, 4.5, 8.0])
def test_theta_gives_the_mean_patch_size_asked_for(mean_patch_bytes):
    texts = ["push the red moon to the left", "reach the cube", "go", ""] * 5
    ids_BS = encode_bytes(texts, 40)
    entropy_BS = torch.rand(ids_BS.shape, generator=torch.Generator().manual_seed(0))
    starts_BS = entropy_starts(entropy_BS, choose_theta(entropy_BS, ids_BS, mean_patch_bytes), ids_BS)
    num_bytes, num_patches = sum(map(len, texts)), int(starts_BS.sum()) - len(texts)
    assert num_patches == pytest.approx(num_bytes / mean_patch_bytes, abs=1)


def test_theta_gives_all_the_patches_it_can_where_the_rule_has_too_few():
    ids_BS = encode_bytes(["abcdef"], 6)
    score_BS = boundary_scores(torch.tensor([[0.0, 1.0, 2.0, 2.0, 1.0, 0.5, 0.0]]), "combined")
    starts_BS = entropy_starts(score_BS, choose_theta(score_BS, ids_BS, 1.0), ids_BS)
    assert patches("abcdef", starts_BS[0]) == ["^", "a", "b", "cdef"]


def test_ids_carry_their_starts():
    ids_BS = encode_bytes(["a b", "c"], 5)
    again_BS, starts_BS = unpack(pack(ids_BS, space_starts(ids_BS)))
    assert torch.equal(again_BS, ids_BS) and torch.equal(starts_BS, space_starts(ids_BS))
    assert patch_of_byte(starts_BS)[0, :4].tolist() == [0, 1, 1, 2]


def test_impossible_options_are_refused():
    ids_BS = encode_bytes(["ab"], 3)
    with pytest.raises(ValueError, match="stride of static patches is 0"):
        static_starts(ids_BS, 0)
    with pytest.raises(ValueError, match=r"entropy_rule is 'local', expected one of global, monotonic, combined"):
        boundary_scores(torch.zeros(1, 4), "local")
    with pytest.raises(ValueError, match=r"mean_patch_bytes is 0\.5"):
        choose_theta(torch.zeros(1, 4), ids_BS, 0.5)
