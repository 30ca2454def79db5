"""How the same task looks and moves in another body: camera, light, table, palette, pusher and action gain."""

from dataclasses import dataclass, field

Rgb = tuple[float, float, float]


def palette(red: Rgb, blue: Rgb, green: Rgb, yellow: Rgb) -> dict[str, Rgb]:
    return {"red": red, "blue": blue, "green": green, "yellow": yellow}


@dataclass(frozen=True)
class Variant:
    """One embodiment. Angles in degrees, lengths in metres, colours in [0, 1]."""

    name: str
    camera_tilt: float = 12.0  # from straight down, towards the viewer
    camera_turn: float = 0.0  # around the vertical
    view_width: float = 0.68  # what the frame spans at the table's height
    light: float = 0.75
    light_direction: tuple[float, float, float] = (-0.3, 0.3, -1.0)
    ambient: float = 0.35
    table: str = "plain"  # plain, checker or marked (random dots)
    table_rgb: tuple[Rgb, Rgb] = ((0.82, 0.80, 0.76), (0.74, 0.72, 0.68))
    block_rgb: dict[str, Rgb] = field(
        default_factory=lambda: palette((0.85, 0.10, 0.10), (0.10, 0.25, 0.90), (0.05, 0.60, 0.15), (0.98, 0.82, 0.05))
    )
    pusher: str = "tip"  # tip or hand
    pusher_rgb: tuple[Rgb, Rgb] = ((0.06, 0.06, 0.07), (0.95, 0.95, 0.95))
    action_gain: float = 1.0  # metres moved for a commanded metre


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("default"),
        # The nearest to people's videos of the same tasks: another body, camera, table and speed.
        Variant(
            "hand",
            camera_tilt=25.0,
            view_width=0.74,
            table="marked",
            table_rgb=((0.60, 0.45, 0.30), (0.52, 0.38, 0.25)),
            pusher="hand",
            pusher_rgb=((0.93, 0.70, 0.58), (0.25, 0.45, 0.55)),
            action_gain=1.25,
        ),
        Variant("tilted", camera_tilt=35.0, camera_turn=25.0, view_width=0.84),
        Variant("dim", light=0.35, light_direction=(0.6, -0.2, -1.0), ambient=0.2),
        Variant("checker", table="checker", table_rgb=((0.90, 0.90, 0.92), (0.62, 0.66, 0.72))),
        Variant(
            "pastel",
            table_rgb=((0.35, 0.36, 0.40), (0.30, 0.31, 0.35)),
            block_rgb=palette((0.95, 0.55, 0.55), (0.55, 0.70, 0.98), (0.60, 0.90, 0.60), (0.99, 0.93, 0.60)),
            pusher_rgb=((0.85, 0.20, 0.80), (0.98, 0.98, 0.98)),
        ),
        Variant("slow", action_gain=0.6),
        Variant("fast", action_gain=1.5),
    )
}


def get_variant(variant: str | Variant) -> Variant:
    """The preset of that name, or the Variant itself; ValueError for an unknown name."""
    if isinstance(variant, Variant):
        return variant
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, expected one of {sorted(VARIANTS)} or a Variant")
    return VARIANTS[variant]
