"""The language of a caption, from its script, else from letter statistics (langdetect)."""

import re
from functools import lru_cache

from video_data.captions.text import weight_of_letters

# Below these, the answer is a guess: "open door" is told to be Dutch. Robot captions are short, so a caption in
# doubt has no language and is never dropped for one.
MIN_LETTERS = 20
MIN_PROBABILITY = 0.9
SEED = 0
# Scripts of one language each. Kana come first, because Japanese is written with Han characters too; by their
# statistics short Chinese captions pass for Korean.
SCRIPTS = {
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "ko": re.compile(r"[\u1100-\u11ff\uac00-\ud7af]"),
    "zh": re.compile(r"[\u4e00-\u9fff]"),
}


def detect_language(caption: str, seed: int = SEED) -> str | None:
    """The ISO 639-1 code of the caption's language, such as "en" or "zh"; None where it is in doubt.

    langdetect draws random numbers; they start from `seed` at every call, so a caption always gets one answer.
    Raises ValueError without the package langdetect.
    """
    if script := next((language for language, letters in SCRIPTS.items() if letters.search(caption)), None):
        return script
    if weight_of_letters(caption) < MIN_LETTERS:
        return None
    detector = _profiles().create()
    detector.seed = seed
    detector.append(caption)
    guesses = _guesses(detector)
    return guesses[0].lang if guesses and guesses[0].prob >= MIN_PROBABILITY else None


def _guesses(detector) -> list:
    from langdetect.lang_detect_exception import LangDetectException

    try:
        return detector.get_probabilities()
    except LangDetectException:  # nothing in it but links and letters that it does not know
        return []


@lru_cache(maxsize=1)
def _profiles():
    # A factory of our own: langdetect's is shared by the whole process, and so is its seed.
    try:
        from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
    except ImportError:
        raise ValueError(
            "the language of captions needs the package langdetect: pip install 'lerobot_policy_lapa[video]'"
        ) from None
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    return factory
