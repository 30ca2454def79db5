"""Clips in which too little moves to learn an action from, or too much (a shaking or panning camera)."""


def reject(scores: dict, options) -> str | None:
    motion = scores["motion"]
    if motion is None:  # nothing to measure: one frame, or motion=off
        return None
    if motion < options.min_motion:
        return f"motion {motion:.4f} heights/s, min_motion is {options.min_motion}"
    if options.max_motion and motion > options.max_motion:
        return f"motion {motion:.4f} heights/s, max_motion is {options.max_motion}"
    return None
