"""Instructions for a robot, what they ask for, and noise on their letters.

A small grammar with several phrasings for each thing to do. The noises are the five that BLT was tested under (arXiv
2412.09871, section 5.3), and typing errors.
"""

from collections.abc import Callable

import numpy as np

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")
OBJECTS = ("moon", "cube", "star", "pentagon", "mug", "bowl", "ring", "bottle", "sponge", "plate")
PLACES = ("left corner", "right corner", "center", "top edge", "bottom edge", "drawer", "box", "tray")
NO_TARGET = "nothing"
TARGETS = (NO_TARGET, *OBJECTS, *PLACES)

# {target} is another object, {place} a place; where there is neither, the target is NO_TARGET.
PHRASINGS = {
    "bring": (
        "push the {colour} {object} to the {target}",
        "move the {colour} {object} next to the {target}",
        "slide the {colour} {object} against the {target}",
        "make the {colour} {object} touch the {target}",
    ),
    "put": (
        "put the {colour} {object} in the {place}",
        "place the {colour} {object} into the {place}",
        "the {colour} {object} belongs in the {place}",
        "store the {colour} {object} in the {place}",
    ),
    "separate": (
        "separate the {colour} {object} from the {target}",
        "move the {colour} {object} away from the {target}",
        "take the {colour} {object} off the {target}",
    ),
    "lift": ("lift the {colour} {object}", "pick up the {colour} {object}", "raise the {colour} {object} up high"),
    "reach": ("go to the {colour} {object}", "touch the {colour} {object}", "reach for the {colour} {object}"),
    "turn": ("turn the {colour} {object} around", "rotate the {colour} {object}", "spin the {colour} {object} once"),
}
ACTIONS = tuple(PHRASINGS)
SLOTS = {"action": ACTIONS, "colour": COLOURS, "object": OBJECTS, "target": TARGETS}
HELD_OUT_SHARE = 5  # one in so many combinations of colour, object and target is for testing


def is_held_out(colour: int, thing: int, target: int) -> bool:
    """Whether a combination is for testing; every word is met in training."""
    return (3 * colour + 7 * thing + target) % HELD_OUT_SHARE == 0


def draw_instructions(
    count: int, held_out: bool, capitals_share: float, rng: np.random.Generator
) -> tuple[list[str], np.ndarray]:
    """Instructions, and (count, 4) int64: the index of each slot's value.

    capitals_share: of the instructions that are all in capitals. The others are in small letters, half of them with a
    capital at the beginning; a third end with a full stop.
    """
    texts: list[str] = []
    slots = []
    while len(texts) < count:
        action, colour, thing = (int(rng.integers(len(values))) for values in (ACTIONS, COLOURS, OBJECTS))
        phrasing = PHRASINGS[ACTIONS[action]][rng.integers(len(PHRASINGS[ACTIONS[action]]))]
        target = 0
        if "{target}" in phrasing:
            target = 1 + int(rng.integers(len(OBJECTS)))
        elif "{place}" in phrasing:
            target = 1 + len(OBJECTS) + int(rng.integers(len(PLACES)))
        if target == 1 + thing or is_held_out(colour, thing, target) != held_out:
            continue
        text = phrasing.format(
            colour=COLOURS[colour], object=OBJECTS[thing], target=TARGETS[target], place=TARGETS[target]
        )
        if rng.random() < 1 / 3:
            text += "."
        if rng.random() < capitals_share:
            text = text.upper()
        elif rng.random() < 0.5:
            text = text[0].upper() + text[1:]
        texts.append(text)
        slots.append((action, colour, thing, target))
    return texts, np.array(slots, dtype=np.int64)


def ant_speak(text: str, rng: np.random.Generator) -> str:
    """Capital letters with spaces between."""
    return " ".join(text.upper().replace(" ", ""))


def drop(text: str, rng: np.random.Generator) -> str:
    """One character in ten is missing."""
    return "".join(character for character in text if rng.random() >= 0.1)


def random_case(text: str, rng: np.random.Generator) -> str:
    """Each letter is a capital or not."""
    return "".join(character.upper() if rng.random() < 0.5 else character.lower() for character in text)


def repeat(text: str, rng: np.random.Generator) -> str:
    """One character in five comes two to four times."""
    return "".join(character * int(rng.integers(2, 5) if rng.random() < 0.2 else 1) for character in text)


def upper_case(text: str, rng: np.random.Generator) -> str:
    """All capitals."""
    return text.upper()


def typos(text: str, rng: np.random.Generator) -> str:
    """One letter in ten is exchanged with the one after it, or is another one."""
    characters = list(text)
    for index in range(len(characters)):
        if not characters[index].isalpha() or rng.random() >= 0.1:
            continue
        if rng.random() < 0.5 and index + 1 < len(characters):
            characters[index : index + 2] = characters[index + 1], characters[index]
        else:
            characters[index] = chr(ord("a") + int(rng.integers(26)))
    return "".join(characters)


NOISES: dict[str, Callable[[str, np.random.Generator], str]] = {
    "ant_speak": ant_speak,
    "drop": drop,
    "random_case": random_case,
    "repeat": repeat,
    "upper_case": upper_case,
    "typos": typos,
}
