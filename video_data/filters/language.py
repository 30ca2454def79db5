"""Captions in other languages than wanted."""


def reject(scores: dict, options) -> str | None:
    language = scores["language"]
    if options.languages and language not in options.languages and language is not None:
        return f"the caption is in {language!r}, languages are {list(options.languages)}"
    return None
