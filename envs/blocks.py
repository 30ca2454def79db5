"""Blocks: four colours times four shapes, drawn as thin prisms. In the physics every block is a disc.

Lengths are in metres.
"""

from dataclasses import dataclass

import numpy as np

COLOURS = ("red", "blue", "green", "yellow")
SHAPES = ("cube", "moon", "star", "pentagon")
BLOCK_RADIUS = 0.034
BLOCK_HEIGHT = 0.03
MAX_BLOCKS = 8


@dataclass(frozen=True)
class Block:
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


ALL_BLOCKS = tuple(Block(colour, shape) for colour in COLOURS for shape in SHAPES)
# Never on the table in the train split. One of each colour and one of each shape, so that every word of an
# unseen block's name is still met in training.
HELD_OUT_BLOCKS = (
    Block("red", "star"),
    Block("blue", "pentagon"),
    Block("green", "moon"),
    Block("yellow", "cube"),
)
TRAIN_BLOCKS = tuple(block for block in ALL_BLOCKS if block not in HELD_OUT_BLOCKS)


def ring(num_points: int, radius: float, start: float = np.pi / 2) -> np.ndarray:
    """Points (num_points, 2) of a regular polygon."""
    angle = start + 2 * np.pi * np.arange(num_points) / num_points
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def outline(shape: str) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """The shape seen from above: its border counter-clockwise (n, 2), and triangles that fill it."""
    if shape == "moon":
        num_points = 10
        outer_angle = np.linspace(np.radians(50), np.radians(310), num_points)
        outer = 0.039 * np.stack([np.cos(outer_angle), np.sin(outer_angle)], axis=1)
        # The inner arc runs between the same two horns around a centre moved to the right.
        centre = np.array([0.024, 0.0])
        first, last = outer[0] - centre, outer[-1] - centre
        inner_angle = np.linspace(np.arctan2(first[1], first[0]), np.arctan2(last[1], last[0]) + 2 * np.pi, num_points)
        inner = centre + np.linalg.norm(first) * np.stack([np.cos(inner_angle), np.sin(inner_angle)], axis=1)
        border = np.concatenate([outer, inner[-2:0:-1]]) + np.array([0.012, 0.0])
        size = len(border)
        triangles = []
        for i in range(num_points - 1):
            inner_here, inner_next = (size - i) % size, size - i - 1  # the two arcs meet in the horns
            if inner_next != i + 1:
                triangles.append((i, i + 1, inner_next))
            if inner_here != i:
                triangles.append((i, inner_next, inner_here))
        return border, triangles
    if shape == "star":
        tips, dents = ring(5, 0.042), ring(5, 0.019, start=np.pi / 2 + np.pi / 5)
        border = np.stack([tips, dents], axis=1).reshape(-1, 2)
    elif shape == "pentagon":
        # A hole, as in a nut: at 64 pixels a full pentagon and a cube look the same.
        border = np.concatenate([ring(5, 0.038), ring(5, 0.017)])
        triangles = []
        for i in range(5):
            j = (i + 1) % 5
            triangles += [(i, j, 5 + j), (i, 5 + j, 5 + i)]
        return border, triangles
    else:
        border = ring(4, 0.042, start=np.pi / 4)
    size = len(border)
    centre_index = size
    return border, [(i, (i + 1) % size, centre_index) for i in range(size)]


def prism(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """A thin prism: vertices (v, 3) and outward faces (f, 3). Top and sides share no vertex, to keep edges crisp."""
    border, triangles = outline(shape)
    size = len(border)
    points = np.concatenate([border, np.zeros((1, 2))])
    half = BLOCK_HEIGHT / 2
    level = {"top": 0, "bottom": size + 1, "side_top": 2 * size + 2, "side_bottom": 3 * size + 2}
    top = np.column_stack([points, np.full(size + 1, half)])
    bottom = np.column_stack([points, np.full(size + 1, -half)])
    vertices = np.concatenate([top, bottom, top[:size], bottom[:size]])
    faces = [(a, b, c) for a, b, c in triangles]
    faces += [(level["bottom"] + a, level["bottom"] + c, level["bottom"] + b) for a, b, c in triangles]
    for i in range(size):
        j = (i + 1) % size
        faces.append((level["side_bottom"] + i, level["side_bottom"] + j, level["side_top"] + j))
        faces.append((level["side_bottom"] + i, level["side_top"] + j, level["side_top"] + i))
    return vertices, np.array(faces)
