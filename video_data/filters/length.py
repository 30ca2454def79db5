"""Clips too short to hold a pair of frames, or longer than wanted."""


def reject(scores: dict, options) -> str | None:
    num_frames, duration_s = scores["num_frames"], scores["duration_s"]
    if num_frames < options.min_frames:
        return f"too short: {num_frames} frames, min_frames is {options.min_frames}"
    if duration_s < options.min_duration_s:
        return f"too short: {duration_s:.2f} s, min_duration_s is {options.min_duration_s}"
    if options.max_duration_s and duration_s > options.max_duration_s:
        return f"too long: {duration_s:.2f} s, max_duration_s is {options.max_duration_s}"
    return None
