"""Synthetic episodes of three modalities with statistics of their own, whose true probabilities are known.

    [ topic, words ..., style | image codes, row by row | binned actions ]

A topic has a table of likely next words, a style a table of likely neighbours of an image code, and topic and style
together name a skill: way-points that a noisy position runs after. The first word tells the topic, the last the style,
so that a model has to hold many tables and look up the right one: room for experts, of another kind in every modality.

Shapes: N sequences, S tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lapa.backbones.base import IMAGE, ROBOT_ACTION, TEXT

NUM_WORDS, NUM_CODES, NUM_BINS = 48, 48, 32
NUM_DIALECTS = 8  # topics, and as many styles
NUM_SKILLS = 8
NUM_WAY_POINTS = 4
SUCCESSOR_SHARES = np.array([0.6, 0.25, 0.1, 0.05])
TEXT_LENGTH, IMAGE_SIDE, ACTION_LENGTH = 16, 5, 16
SEQUENCE_LENGTH = TEXT_LENGTH + IMAGE_SIDE**2 + ACTION_LENGTH
MODALITIES = [TEXT] * TEXT_LENGTH + [IMAGE] * IMAGE_SIDE**2 + [ROBOT_ACTION] * ACTION_LENGTH

# One vocabulary for all: topics, styles, words, image codes, action bins.
FIRST_TOPIC = 0
FIRST_STYLE = FIRST_TOPIC + NUM_DIALECTS
FIRST_WORD = FIRST_STYLE + NUM_DIALECTS
FIRST_CODE = FIRST_WORD + NUM_WORDS
FIRST_BIN = FIRST_CODE + NUM_CODES
VOCABULARY = FIRST_BIN + NUM_BINS


@dataclass(frozen=True)
class World:
    """Tables of what follows what.

    words, codes: (dialect, token, successor) int64, the likeliest successors first; they may repeat.
    way_points: (skill, way-point), in bins.
    """

    words: np.ndarray
    codes: np.ndarray
    way_points: np.ndarray


def make_world(seed: int) -> World:
    """Random tables."""
    rng = np.random.default_rng([seed, 0, 1])
    successors = len(SUCCESSOR_SHARES)
    return World(
        words=rng.integers(NUM_WORDS, size=(NUM_DIALECTS, NUM_WORDS, successors)),
        codes=rng.integers(NUM_CODES, size=(NUM_DIALECTS, NUM_CODES, successors)),
        way_points=rng.integers(2, NUM_BINS - 2, size=(NUM_SKILLS, NUM_WAY_POINTS)),
    )


def draw_sequences(world: World, number: int, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Tokens (N, S) int64 of the vocabulary, and the true log-probability (N, S) of each given those before it."""
    tokens: list[np.ndarray] = []
    log_p: list[np.ndarray] = []

    def add(first: int, drawn_N: np.ndarray, log_p_N: np.ndarray) -> None:
        tokens.append(first + drawn_N)
        log_p.append(log_p_N)

    def draw(p_NK: np.ndarray, first: int) -> np.ndarray:
        drawn_N = (rng.random((number, 1)) > p_NK.cumsum(1)).sum(1).clip(max=p_NK.shape[1] - 1)
        add(first, drawn_N, np.log(p_NK[np.arange(number), drawn_N]))
        return drawn_N

    def even(choices: int) -> np.ndarray:
        return np.full((number, choices), 1 / choices)

    topic_N = draw(even(NUM_DIALECTS), FIRST_TOPIC)
    word_N = draw(even(NUM_WORDS), FIRST_WORD)
    for _ in range(TEXT_LENGTH - 3):
        word_N = draw(after(world.words[topic_N, word_N], NUM_WORDS), FIRST_WORD)
    style_N = draw(even(NUM_DIALECTS), FIRST_STYLE)

    codes: list[np.ndarray] = []
    for place in range(IMAGE_SIDE**2):
        parents = ([codes[-1]] if place % IMAGE_SIDE else []) + ([codes[-IMAGE_SIDE]] if place >= IMAGE_SIDE else [])
        p_NK = even(NUM_CODES)
        if parents:
            p_NK = np.mean([after(world.codes[style_N, parent_N], NUM_CODES) for parent_N in parents], axis=0)
        codes.append(draw(p_NK, FIRST_CODE))

    skill_N = (topic_N + style_N) % NUM_SKILLS
    position_N = draw(even(NUM_BINS), FIRST_BIN)
    for step in range(1, ACTION_LENGTH):
        goal_N = world.way_points[skill_N, step * NUM_WAY_POINTS // ACTION_LENGTH]
        # Half of the way in each step, give or take a bin.
        distance_NK = np.arange(NUM_BINS) - (position_N + 0.5 * (goal_N - position_N))[:, None]
        p_NK = np.exp(-0.5 * distance_NK**2)
        position_N = draw(p_NK / p_NK.sum(1, keepdims=True), FIRST_BIN)
    return torch.from_numpy(np.stack(tokens, 1)), np.stack(log_p, 1)


def after(successors_NK: np.ndarray, choices: int) -> np.ndarray:
    """Probabilities (N, choices) of the next token, from each one's likeliest successors."""
    p_NC = np.zeros((len(successors_NK), choices))
    rows = np.arange(len(successors_NK))
    for rank, share in enumerate(SUCCESSOR_SHARES):
        p_NC[rows, successors_NK[:, rank]] += share
    return p_NC
