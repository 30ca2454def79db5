"""From bytes to a caption: encodings, mojibake, markup of the web and control characters."""

import codecs
import re

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def decode_text(data: bytes) -> str:
    """UTF-8, or UTF-16 and UTF-32 that open with a byte-order mark. Raises ValueError for other bytes.

    Nothing is guessed: bytes of an unknown encoding read as another one are a caption that nobody wrote.
    """
    # UTF-32's mark begins with UTF-16's, so the longer ones are looked for first.
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8-sig")
    return data.decode(encoding)


def clean_caption(text: str) -> str:
    """One line of text: mojibake undone, HTML entities resolved, control characters and extra spaces removed."""
    # Plain ASCII has nothing to repair but entities, and needs no package.
    if not text.isascii() or "&" in text:
        try:
            import ftfy
        except ImportError:
            raise ValueError(
                "captions outside ASCII need the package ftfy: pip install 'lerobot_policy_lapa[video]'"
            ) from None
        text = ftfy.fix_text(text, normalization="NFC")
    return " ".join(NO_TEXT.sub(" ", text).split())


def weight_of_letters(text: str) -> int:
    """How much the letters of `text` tell about its language: one each, four where they are not Latin."""
    letters = [character for character in text if character.isalpha()]
    return sum(1 if ord(character) < 0x250 else 4 for character in letters)
