import pytest

from envs import FAMILIES
from envs.blocks import ALL_BLOCKS, COLOURS, HELD_OUT_BLOCKS, SHAPES
from envs.instructions import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES
from envs.tabletop import TabletopEnv


def scenes(family, split, num_seeds=40):
    env = TabletopEnv(family, split=split, observe_pixels=False)
    for seed in range(num_seeds):
        env.reset(seed=seed)
        yield env.scene.blocks, env.instruction


@pytest.mark.parametrize("family", FAMILIES)
def test_train_split_never_shows_a_held_out_block(family):
    for blocks, instruction in scenes(family, "train"):
        assert not set(blocks) & set(HELD_OUT_BLOCKS)
        assert blocks[0].name in instruction


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["unseen", "unseen_blocks"])
def test_unseen_blocks_are_what_the_instruction_is_about(family, split):
    for blocks, instruction in scenes(family, split):
        assert blocks[0] in HELD_OUT_BLOCKS
        assert blocks[0].name in instruction


@pytest.mark.parametrize("family", FAMILIES)
def test_unseen_phrasings_are_never_used_in_training(family):
    assert not set(TRAIN_TEMPLATES[family]) & set(HELD_OUT_TEMPLATES[family])
    train = {instruction for _, instruction in scenes(family, "train", 100)}
    unseen = {instruction for _, instruction in scenes(family, "unseen_phrases", 100)}
    assert not train & unseen


def test_every_word_of_a_held_out_block_is_met_in_training():
    kept = set(ALL_BLOCKS) - set(HELD_OUT_BLOCKS)
    assert {block.colour for block in kept} == set(COLOURS)
    assert {block.shape for block in kept} == set(SHAPES)


@pytest.mark.parametrize("family", FAMILIES)
def test_instructions_vary_and_leave_no_blank(family):
    written = [instruction for _, instruction in scenes(family, "train")]
    assert len(set(written)) > 15
    assert not any("{" in instruction for instruction in written)


def test_same_seed_sets_the_same_positions_in_both_splits():
    train, unseen = (TabletopEnv("reach", split=split, observe_pixels=False) for split in ("train", "unseen"))
    train.reset(seed=4), unseen.reset(seed=4)
    assert (train.scene.blocks_xy == unseen.scene.blocks_xy).all()
