"""The table, the camera, the pusher and eight block slots as MJCF.

Physics in the plane: a block has two sliding joints and one hinge with strong damping, so that it stops within a
centimetre when the push ends, and never touches the table. All contacts are between spheres whose centres share one
height, that is between discs. A velocity servo drives the pusher. It has no force limit, since the implicit
integrator leaves a saturated servo undamped: the highest speed error bounds the force instead.
"""

import numpy as np

from envs.blocks import BLOCK_HEIGHT, BLOCK_RADIUS, MAX_BLOCKS, SHAPES, prism
from envs.rendering import SUPERSAMPLING
from envs.variants import Variant

CONTROL_HZ = 10
TIMESTEP_S = 0.01
NUM_SUBSTEPS = round(1 / (CONTROL_HZ * TIMESTEP_S))
TIP_RADIUS = 0.02  # in contacts; it is drawn wider above the blocks
CONTACT_DISTANCE = TIP_RADIUS + BLOCK_RADIUS
TIP_RANGE = 0.31  # the tip's workspace is [-TIP_RANGE, TIP_RANGE] in x and y, metres
BLOCK_RANGE = 0.25  # smaller, so that the tip fits between a block and the border
MAX_STEP = 0.03  # metres in x and in y within one control step


def numbers(values: "np.ndarray | tuple[float, ...]") -> str:
    return " ".join(f"{value:.5g}" for value in np.asarray(values).ravel())


def camera_xml(variant: Variant) -> str:
    distance = 1.2
    tilt, turn = np.radians(variant.camera_tilt), np.radians(variant.camera_turn)
    rotate = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    right = rotate @ np.array([1.0, 0, 0])
    up = rotate @ np.array([0, np.cos(tilt), np.sin(tilt)])
    position = rotate @ np.array([0, -np.sin(tilt), np.cos(tilt)]) * distance
    fovy = np.degrees(2 * np.arctan(variant.view_width / 2 / distance))
    return f'<camera name="top" pos="{numbers(position)}" xyaxes="{numbers(right)} {numbers(up)}" fovy="{fovy:.5g}"/>'


def table_xml(variant: Variant) -> tuple[str, str]:
    """The table's texture and material, and its geom."""
    first, second = variant.table_rgb
    builtin = "checker" if variant.table == "checker" else "flat"
    mark = 'mark="random" random="0.25"' if variant.table == "marked" else ""
    assets = (
        f'<texture name="table" type="2d" builtin="{builtin}" width="64" height="64" '
        f'rgb1="{numbers(first)}" rgb2="{numbers(second)}" {mark} markrgb="{numbers(second)}"/>'
        '<material name="table" texture="table" texrepeat="4 4" specular="0" shininess="0"/>'
    )
    return assets, '<geom type="box" size="1 1 0.01" pos="0 0 -0.01" material="table" class="drawn"/>'


def pusher_xml(variant: Variant) -> str:
    """What is drawn of the pusher: a tip, or a hand that comes from the viewer's side with its sleeve."""
    body, mark = (f'rgba="{numbers(rgb)} 1"' for rgb in variant.pusher_rgb)
    if variant.pusher == "hand":
        fingers = "".join(
            f'<geom type="capsule" size="0.0075 0.013" pos="{x} 0.022 0.02" euler="90 0 0" {body} class="drawn"/>'
            for x in (-0.022, -0.0075, 0.0075, 0.022)
        )
        return (
            f'<geom type="ellipsoid" size="0.031 0.026 0.02" pos="0 -0.005 0.025" {body} class="drawn"/>{fingers}'
            f'<geom type="capsule" size="0.009 0.014" pos="0.033 0 0.02" euler="90 0 -35" {body} class="drawn"/>'
            f'<geom type="capsule" size="0.022 0.045" pos="0 -0.07 0.035" euler="90 0 0" {mark} class="drawn"/>'
        )
    return (
        f'<geom type="cylinder" size="0.028 0.025" pos="0 0 0.025" {body} class="drawn"/>'
        f'<geom type="cylinder" size="0.013 0.0255" pos="0 0 0.026" {mark} class="drawn"/>'
    )


def block_xml(slot: int) -> str:
    drawn = "".join(f'<geom name="block{slot}_{shape}" type="mesh" mesh="{shape}" class="drawn"/>' for shape in SHAPES)
    return f"""
    <body name="block{slot}" pos="0 0 {BLOCK_HEIGHT / 2}">
      <inertial pos="0 0 0" mass="0.1" diaginertia="6e-5 6e-5 6e-5"/>
      <joint type="slide" axis="1 0 0" damping="5" limited="true" range="{-BLOCK_RANGE} {BLOCK_RANGE}"/>
      <joint type="slide" axis="0 1 0" damping="5" limited="true" range="{-BLOCK_RANGE} {BLOCK_RANGE}"/>
      <joint type="hinge" axis="0 0 1" damping="0.003"/>
      <geom name="block{slot}" type="sphere" size="{BLOCK_RADIUS}" class="disc"/>
      {drawn}
    </body>"""


def arena_xml(variant: Variant, image_size: int) -> str:
    """The arena as MJCF text, for square frames of image_size pixels."""
    meshes = []
    for shape in SHAPES:
        vertices, faces = prism(shape)
        meshes.append(
            f'<mesh name="{shape}" vertex="{numbers(vertices)}" face="{" ".join(map(str, faces.ravel()))}" '
            'inertia="shell"/>'
        )
    table_assets, table_geom = table_xml(variant)
    buffer_size = SUPERSAMPLING * image_size
    light, ambient = (numbers((level,) * 3) for level in (variant.light, variant.ambient))
    return f"""
<mujoco model="tabletop">
  <compiler angle="degree" autolimits="true"/>
  <option timestep="{TIMESTEP_S}" integrator="implicitfast" gravity="0 0 0" iterations="10" ls_iterations="10"/>
  <visual>
    <global offwidth="{buffer_size}" offheight="{buffer_size}"/>
    <quality offsamples="0" shadowsize="0"/>
    <headlight active="1" ambient="{ambient}" diffuse="0 0 0" specular="0 0 0"/>
    <map znear="0.1" zfar="10"/>
  </visual>
  <default>
    <default class="drawn"><geom contype="0" conaffinity="0" mass="0"/></default>
    <default class="disc"><geom group="3" condim="3" friction="0.3 0.005 0.0001" mass="0" rgba="0 0 0 0"/></default>
  </default>
  <asset>{table_assets}{"".join(meshes)}</asset>
  <worldbody>
    <light directional="true" castshadow="false" dir="{numbers(variant.light_direction)}" diffuse="{light}"
      specular="0 0 0" ambient="0 0 0"/>
    {camera_xml(variant)}
    {table_geom}
    <body name="tip" pos="0 0 {BLOCK_HEIGHT / 2}">
      <inertial pos="0 0 0" mass="0.2" diaginertia="1e-4 1e-4 1e-4"/>
      <joint name="tip_x" type="slide" axis="1 0 0"/>
      <joint name="tip_y" type="slide" axis="0 1 0"/>
      <geom name="tip" type="sphere" size="{TIP_RADIUS}" class="disc"/>
      {pusher_xml(variant)}
    </body>
    {"".join(block_xml(slot) for slot in range(MAX_BLOCKS))}
  </worldbody>
  <actuator>
    <velocity joint="tip_x" kv="150"/>
    <velocity joint="tip_y" kv="150"/>
  </actuator>
</mujoco>"""
