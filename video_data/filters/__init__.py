"""Which clips are left out, and why: one small file a filter, all with one signature.

    reject(scores: dict, options: IngestFilters) -> str | None

`scores` are the columns of the manifest that are known by then; the answer is a reason with the number found and
the threshold, or None to keep the clip. A clip is rejected by the first filter that has a reason. Every default
keeps every clip. Near duplicates, which need the other clips, are in `video_data/duplicates.py`.
"""

from types import ModuleType

from video_data.filters import darkness, language, length, motion, sharpness, shots, stillness, text

# Those that only look at the request come first and spare the decoding; text recognition, the slowest, comes last.
BEFORE_DECODING: dict[str, ModuleType] = {"language": language}
AFTER_DECODING: dict[str, ModuleType] = {
    "length": length,
    "darkness": darkness,
    "stillness": stillness,
    "motion": motion,
    "sharpness": sharpness,
    "shots": shots,
    "text": text,
}


def first_reason(filters: dict[str, ModuleType], scores: dict, options) -> tuple[str, str] | None:
    """(filter, reason) of the first filter that rejects the clip; None where all keep it."""
    for name, module in filters.items():
        reason = module.reject(scores, options)
        if reason is not None:
            return name, reason
    return None
