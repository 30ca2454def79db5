"""The synthetic episodes are drawn from the probabilities that they come with."""

import numpy as np

from lapa.backbones.base import IMAGE, ROBOT_ACTION, TEXT
from lapa.studies.dialects import (
    FIRST_BIN,
    FIRST_CODE,
    FIRST_STYLE,
    FIRST_TOPIC,
    FIRST_WORD,
    IMAGE_SIDE,
    MODALITIES,
    NUM_BINS,
    NUM_CODES,
    NUM_DIALECTS,
    NUM_SKILLS,
    NUM_WAY_POINTS,
    NUM_WORDS,
    SEQUENCE_LENGTH,
    SUCCESSOR_SHARES,
    TEXT_LENGTH,
    VOCABULARY,
    draw_sequences,
    make_world,
)

WORLD = make_world(0)
IDS, LOG_P = draw_sequences(WORLD, 400, np.random.default_rng(0))
IDS = IDS.numpy()


def test_every_token_is_of_its_modalitys_vocabulary():
    assert IDS.shape == LOG_P.shape == (400, SEQUENCE_LENGTH) and IDS.max() < VOCABULARY
    assert len(MODALITIES) == SEQUENCE_LENGTH
    ranges = {IMAGE: (FIRST_CODE, NUM_CODES), ROBOT_ACTION: (FIRST_BIN, NUM_BINS)}
    for place in range(SEQUENCE_LENGTH):
        first, number = ranges.get(MODALITIES[place], (FIRST_WORD, NUM_WORDS))
        if place == 0:
            first, number = FIRST_TOPIC, NUM_DIALECTS
        elif place == TEXT_LENGTH - 1:
            first, number = FIRST_STYLE, NUM_DIALECTS
        assert first <= IDS[:, place].min() and IDS[:, place].max() < first + number
    assert MODALITIES.count(TEXT) == TEXT_LENGTH


def test_words_follow_the_table_of_their_topic_as_often_as_it_says():
    likeliest = WORLD.words[IDS[:, :1] - FIRST_TOPIC, IDS[:, 1 : TEXT_LENGTH - 2] - FIRST_WORD, 0]
    assert abs((IDS[:, 2 : TEXT_LENGTH - 1] - FIRST_WORD == likeliest).mean() - SUCCESSOR_SHARES[0]) < 0.05
    other_topic = (IDS[:, :1] - FIRST_TOPIC + 1) % NUM_DIALECTS
    elsewhere = WORLD.words[other_topic, IDS[:, 1 : TEXT_LENGTH - 2] - FIRST_WORD, 0]
    assert (IDS[:, 2 : TEXT_LENGTH - 1] - FIRST_WORD == elsewhere).mean() < 0.1


def test_image_codes_follow_their_left_or_upper_neighbour():
    image = (IDS[:, TEXT_LENGTH : TEXT_LENGTH + IMAGE_SIDE**2] - FIRST_CODE).reshape(-1, IMAGE_SIDE, IMAGE_SIDE)
    style = IDS[:, TEXT_LENGTH - 1, None, None] - FIRST_STYLE
    left, up, inner = image[:, 1:, :-1], image[:, :-1, 1:], image[:, 1:, 1:]
    of_left = (WORLD.codes[style, left] == inner[..., None]).any(-1)
    of_up = (WORLD.codes[style, up] == inner[..., None]).any(-1)
    assert (of_left | of_up).all() and 0.5 < of_left.mean() < 0.75


def test_actions_arrive_at_the_way_points_of_topic_and_style():
    skill = (IDS[:, 0] - FIRST_TOPIC + IDS[:, TEXT_LENGTH - 1] - FIRST_STYLE) % NUM_SKILLS
    last_way_point = WORLD.way_points[skill, NUM_WAY_POINTS - 1]
    assert np.abs(IDS[:, -1] - FIRST_BIN - last_way_point).mean() < 2


def test_log_probabilities_are_true():
    assert np.allclose(LOG_P[:, 0], -np.log(NUM_DIALECTS)) and (LOG_P < 0).all()
    # Drawn tokens are as probable as the entropy of their distribution says, on average.
    entropy = -(SUCCESSOR_SHARES * np.log(SUCCESSOR_SHARES)).sum()
    assert abs(-LOG_P[:, 2 : TEXT_LENGTH - 1].mean() - entropy) < 0.08


def test_a_seed_is_a_world_and_a_draw():
    again, _ = draw_sequences(make_world(0), 400, np.random.default_rng(0))
    assert np.array_equal(again.numpy(), IDS)
    assert not np.array_equal(make_world(1).words, WORLD.words)
