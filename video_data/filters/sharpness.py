"""Blurred clips: a low variance of the Laplacian (Pech-Pacheco 2000)."""


def reject(scores: dict, options) -> str | None:
    sharpness = scores["sharpness"]
    if sharpness is not None and sharpness < options.min_sharpness:
        return f"blurred: sharpness {sharpness:.1f}, min_sharpness is {options.min_sharpness}"
    return None
