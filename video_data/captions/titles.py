"""Noisy titles made from true captions, and the slots by which a caption is compared with the true one.

The grammar is that of instructions about coloured objects: "<verb> the <colour> <object> [<where>] [by <brand>]".
Which objects and which places there are is found in the captions (`Lexicon`); colours, verbs and words for places
are lists below.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

SLOTS = ("verb", "colour", "object", "target", "brand")
# What is wrong with a title. "clean" ones are trained on too: otherwise every plain title would have an error, and a
# model that cannot see would do well to change any word.
KINDS = ("empty", "swapped", "chatter", "brand")
TRAINING_KINDS = (*KINDS, "clean")

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple", "brown", "pink", "grey", "gray")
# Words for one action are one verb: a picture does not tell which of them the writer chose.
VERBS = {
    "reach": "reach",
    "touch": "reach",
    "go": "reach",
    "move to": "reach",
    "push": "push",
    "move": "push",
    "slide": "push",
    "put": "push",
    "separate": "separate",
    "pick": "pick",
    "lift": "lift",
}
PLACES = {
    "center": "center",
    "middle": "center",
    "left": "left",
    "right": "right",
    "top": "top",
    "above": "top",
    "bottom": "bottom",
    "below": "bottom",
}

CHATTER = (
    "wow look at this!! {}",
    "you won't believe this {} part 2",
    "{} (gone wrong) lol",
    "my robot day 14: {} #robotics",
    "{} full video, like and subscribe",
    "omg {} !!!",
    "best of {} compilation",
    "IMG_2041 {}",
)
# Phrases of the titles that a realigner is measured on; training meets neither them nor the brands there.
HELD_OUT_CHATTER = (
    "watch till the end... {}",
    "{} so satisfying",
    "trying {} at home, day 3",
    "{} | link in bio",
)
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvxz" for vowel in "aeio")
HELD_OUT_BRANDS = 5  # one brand in so many

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def split_words(text: str) -> list[str]:
    """The words of a text as they are written, without punctuation: a file name is as many words as it has parts."""
    return WORD.findall(text)


@dataclass(frozen=True)
class Parsed:
    """Slots of a text, and where its first coloured object is: words[entity] and words[entity + 1]; None for none."""

    words: list[str]
    slots: dict[str, str]
    entity: int | None


def parse(text: str, objects: Iterable[str] | None = None) -> Parsed:
    """Slots of an instruction or a title; a slot that the text does not fill is left out.

    objects: the nouns that count as objects; None: any word behind a colour. Slots are canonical: "move to", "go to"
    and "touch" are one verb, "middle of the table" and "center" one target, where a second object with its colour
    is part of the target.
    """
    written = split_words(text)
    words = [word.lower() for word in written]
    slots: dict[str, str] = {}
    if "by" in words[:-1]:
        # What a thing is by comes last in this grammar.
        place = max(i for i, word in enumerate(words[:-1]) if word == "by")
        slots["brand"] = words[place + 1]
        words = words[:place]
    known = None if objects is None else set(objects)
    entities = [i for i in range(len(words) - 1) if words[i] in COLOURS and (words[i + 1] in known if known else True)]
    for i, word in enumerate(words):
        verb = VERBS.get(f"{word} {words[i + 1]}") if i + 1 < len(words) else None
        if verb := verb or VERBS.get(word):
            slots["verb"] = verb
            break
    if not entities:
        return Parsed(written, slots, None)
    first = entities[0]
    slots |= {"colour": words[first], "object": words[first + 1]}
    target = []
    for i in range(first + 2, len(words)):
        if i in entities or i - 1 in entities:
            target.append(words[i])
        elif words[i] in PLACES:
            target.append(PLACES[words[i]])
    if target:
        slots["target"] = " ".join(target)
    return Parsed(written, slots, first)


@dataclass(frozen=True)
class Lexicon:
    """What the captions of a data set speak of: colours, objects, and ends of sentences that tell where."""

    colours: tuple[str, ...]
    objects: tuple[str, ...]
    ends: tuple[tuple[str, str], ...]  # (target, the words that say it)

    @classmethod
    def of(cls, captions: Sequence[str]) -> "Lexicon":
        """Raises ValueError where the captions name fewer than two colours or two kinds of coloured objects."""
        colours: set[str] = set()
        objects: set[str] = set()
        ends: set[tuple[str, str]] = set()
        for caption in captions:
            found = parse(caption)
            if found.entity is None:
                continue
            colours.add(found.slots["colour"])
            objects.add(found.slots["object"])
            if "target" in found.slots:
                ends.add((found.slots["target"], " ".join(found.words[found.entity + 2 :])))
        if min(len(colours), len(objects)) < 2:
            raise ValueError(
                f"the captions name the colours {sorted(colours)} and the objects {sorted(objects)}: entities are "
                "swapped for others of the data, so it needs two of each in captions such as 'reach the red cube'"
            )
        return cls(tuple(sorted(colours)), tuple(sorted(objects)), tuple(sorted(ends)))


@dataclass(frozen=True)
class Title:
    """A noisy title, what a caption should say instead, and the slot that was swapped ("" where none was)."""

    kind: str
    text: str
    truth: str
    swapped: str = ""


def make_title(caption: str, kind: str, lexicon: Lexicon, rng: np.random.Generator, held_out: bool = False) -> Title:
    """A title of a kind (`TRAINING_KINDS`) for a clip with this true caption.

    held_out: with the brands and the phrases of chatter that are kept for measuring. A swap needs a coloured object:
    the title of a caption without one stays clean.
    """
    if kind == "empty":
        return Title(kind, "", caption)
    if kind == "brand":
        branded = f"{caption} by {make_name(rng, held_out).capitalize()}"
        return Title(kind, branded, branded)
    if kind == "chatter":
        return Title(kind, _chatter(caption, rng, held_out), caption)
    if kind == "swapped":
        return _swap(caption, lexicon, rng)
    if kind != "clean":
        raise ValueError(f"kind is {kind!r}, expected one of {TRAINING_KINDS}")
    return Title(kind, caption, caption)


def make_name(rng: np.random.Generator, held_out: bool) -> str:
    """A word that is in no dictionary, as names of brands and of uploaders are; the held-out ones are never others."""
    while True:
        name = "".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=3))
        if (zlib.crc32(name.encode()) % HELD_OUT_BRANDS == 0) == held_out:
            return name


def _chatter(caption: str, rng: np.random.Generator, held_out: bool) -> str:
    """What people write around nothing, around the object's name, or around all that is done."""
    found = parse(caption)
    subject = "" if found.entity is None else " ".join(found.words[found.entity : found.entity + 2])
    inside = ("", subject, caption)[rng.integers(3)]
    phrases = HELD_OUT_CHATTER if held_out else CHATTER
    text = phrases[rng.integers(len(phrases))].format(inside)
    # Not every unknown word is worth keeping.
    if rng.random() < 0.5:
        text += f" @{make_name(rng, held_out)}"
    return " ".join(text.split())


def _swap(caption: str, lexicon: Lexicon, rng: np.random.Generator) -> Title:
    found = parse(caption)
    if found.entity is None:
        return Title("clean", caption, caption)
    ends = [end for target, end in lexicon.ends if target != found.slots.get("target")]
    choices = ["colour", "object"] + (["target"] if "target" in found.slots and ends else [])
    slot = choices[rng.integers(len(choices))]
    words, at = list(found.words), found.entity
    if slot == "target":
        words[at + 2 :] = [ends[rng.integers(len(ends))]]
    else:
        known = lexicon.colours if slot == "colour" else lexicon.objects
        others = [word for word in known if word != found.slots[slot]]
        words[at + (slot == "object")] = others[rng.integers(len(others))]
    return Title("swapped", " ".join(words), caption, slot)
