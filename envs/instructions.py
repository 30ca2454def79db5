"""Templated instructions with synonyms; some phrasings are kept for the unseen split.

The words for blocks, places and directions are the same in all splits: only how they are asked for differs.
"""

import numpy as np

# "train" meets neither the held-out blocks nor the held-out phrasings, "unseen" is made of both.
SPLITS = ("train", "unseen", "unseen_blocks", "unseen_phrases")

# A word in braces that is not given by the task is drawn from here; so is any given word that has an entry.
SYNONYMS = {
    "verb": ("push", "move", "slide"),
    "center": ("center of the table", "middle of the table"),
    "left": ("left", "left side"),
    "right": ("right", "right side"),
    "top": ("top", "top side"),
    "bottom": ("bottom", "bottom side"),
    "top left": ("top left", "top left corner"),
    "top right": ("top right", "top right corner"),
    "bottom left": ("bottom left", "bottom left corner"),
    "bottom right": ("bottom right", "bottom right corner"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "to the top of"),
    "below": ("below", "to the bottom of"),
}
TRAIN_TEMPLATES = {
    "reach": ("move to the {block}", "go to the {block}", "reach the {block}", "touch the {block}"),
    "block_to_block": (
        "{verb} the {block} to the {target}",
        "{verb} the {block} next to the {target}",
        "{verb} the {block} against the {target}",
    ),
    "block_to_absolute": (
        "{verb} the {block} to the {place}",
        "{verb} the {block} into the {place}",
        "put the {block} in the {place}",
    ),
    "block_to_side": ("{verb} the {block} {side} the {target}", "put the {block} {side} the {target}"),
    "block_to_relative": (
        "{verb} the {block} {direction}",
        "{verb} the {block} a bit {direction}",
        "{verb} the {block} {direction} from where it is",
    ),
    "separate_blocks": (
        "separate the {block} from the {target}",
        "{verb} the {block} away from the {target}",
        "{verb} the {block} and the {target} apart",
    ),
    "pick": ("pick up the {block}", "lift the {block}", "grasp the {block} and lift it", "take the {block}"),
    "place": (
        "put the {block} on the {target}",
        "place the {block} on the {target}",
        "lay the {block} down on the {target}",
    ),
    "stack": (
        "stack the {block} on the {target}",
        "put the {block} on top of the {target}",
        "place the {block} on the {target}",
    ),
}
HELD_OUT_TEMPLATES = {
    "reach": ("bring the tip over to the {block}", "the {block} is where to go"),
    "block_to_block": ("make the {block} touch the {target}", "bring the {block} and the {target} together"),
    "block_to_absolute": ("the {block} belongs in the {place}", "bring the {block} over to the {place}"),
    "block_to_side": ("the {block} should be {side} the {target}", "bring the {block} over, {side} the {target}"),
    "block_to_relative": ("the {block} should go {direction}", "shift the {block} further {direction}"),
    "separate_blocks": ("make room between the {block} and the {target}", "take the {block} off the {target}"),
    "pick": ("raise the {block} off the table", "the {block} should be in the air"),
    "place": ("the {block} belongs on the {target}", "bring the {block} over onto the {target}"),
    "stack": ("the {block} should sit on the {target}", "build a tower with the {block} on the {target}"),
}


def write_instruction(family: str, words: dict[str, str], split: str, rng: np.random.Generator) -> str:
    """One instruction of the family with its words filled in, from the phrasings of the split."""
    held_out = split in ("unseen", "unseen_phrases")
    templates = (HELD_OUT_TEMPLATES if held_out else TRAIN_TEMPLATES)[family]
    template = templates[rng.integers(len(templates))]
    filled = {}
    for role, word in {"verb": "verb", **words}.items():
        # A direction ("push it left") is a bare adverb: "left side" would make it a place.
        choices = (word,) if role == "direction" else SYNONYMS.get(word, (word,))
        filled[role] = choices[rng.integers(len(choices))]
    return template.format(**filled)
