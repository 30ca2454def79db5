"""The table, the camera, the gripper and four block slots as MJCF.

The gripper hangs on three sliding joints with velocity servos and never turns; its two fingers close along x, kept
symmetric by a joint equality. One servo of limited force drives them, so a block is held by friction alone. The servos
that move the gripper have no force limit (see envs.arena); its workspace keeps the fingertips off the table.

A dark disc on the table marks what is below the gripper: with one camera, only that tells its height from its place.
"""

from dataclasses import replace

from envs.arena import CONTROL_HZ, camera_xml, numbers, table_xml
from envs.rendering import SUPERSAMPLING
from envs.variants import Variant, get_variant

TIMESTEP_S = 0.005
NUM_SUBSTEPS = round(1 / (CONTROL_HZ * TIMESTEP_S))
MAX_STEP = 0.03  # metres in x, in y and in z within one control step
MAX_OPENING = 0.08  # metres between the fingers
MAX_BLOCKS, MAX_PLATES = 4, 2
SHAPES = ("cube", "cylinder")
BLOCK_SIZE = 0.05  # a cube's edge; a cylinder's height and diameter; metres
PLATE_RADIUS = 0.045
# The gripper's position is the point between its finger pads that a block's centre should have.
WORKSPACE_LOW, WORKSPACE_HIGH = (-0.19, -0.19, 0.02), (0.19, 0.19, 0.2)
GRIP_FORCE_N = 6.0
FINGER_HALF_SIZES = (0.005, 0.014, 0.032)
FINGERTIP = 0.014  # from the gripper's position down to the fingers' ends

# What of a variant makes sense here: its light, its table and its palette. The camera looks down at 45 degrees.
VARIANTS = ("default", "dim", "checker", "pastel")
CAMERA_TILT, VIEW_WIDTH, LOOK_AT = 45.0, 0.5, (0.0, 0.01, 0.05)


def look_variant(variant: str | Variant) -> Variant:
    """The preset with the gripper suite's camera; ValueError for one that this suite lacks."""
    if isinstance(variant, str) and variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, expected one of {VARIANTS} or a Variant")
    return replace(get_variant(variant), camera_tilt=CAMERA_TILT, view_width=VIEW_WIDTH)


def finger_xml(name: str, side: int) -> str:
    x, y, z = FINGER_HALF_SIZES
    return f"""
      <body name="{name}" pos="{side * x:.5g} 0 {z - FINGERTIP:.5g}" gravcomp="1">
        <inertial pos="0 0 0" mass="0.1" diaginertia="2e-5 2e-5 2e-5"/>
        <joint name="{name}" type="slide" axis="{side} 0 0" range="0 {MAX_OPENING / 2}" damping="20"/>
        <geom name="{name}" type="box" size="{x} {y} {z}" rgba="0.1 0.1 0.11 1" class="pad"/>
      </body>"""


def block_xml(slot: int) -> str:
    half = BLOCK_SIZE / 2
    return f"""
    <body name="block{slot}">
      <inertial pos="0 0 0" mass="0.1" diaginertia="4.2e-5 4.2e-5 4.2e-5"/>
      <joint name="block{slot}" type="free" damping="0.0005"/>
      <geom name="block{slot}_cube" type="box" size="{half} {half} {half}" class="block"/>
      <geom name="block{slot}_cylinder" type="cylinder" size="{half} {half}" class="block"/>
    </body>"""


def arena_xml(variant: Variant, image_size: int) -> str:
    """The arena as MJCF text, for square frames of image_size pixels."""
    table_assets, table_geom = table_xml(variant)
    buffer_size = SUPERSAMPLING * image_size
    light, ambient = (numbers((level,) * 3) for level in (variant.light, variant.ambient))
    palm_z = 2 * FINGER_HALF_SIZES[2] - FINGERTIP
    plates = "".join(
        f'<geom name="plate{slot}" type="cylinder" size="{PLATE_RADIUS} 0.001" pos="0 0 0.001" class="drawn"/>'
        for slot in range(MAX_PLATES)
    )
    return f"""
<mujoco model="gripper">
  <compiler angle="degree" autolimits="true"/>
  <option timestep="{TIMESTEP_S}" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual>
    <global offwidth="{buffer_size}" offheight="{buffer_size}"/>
    <quality offsamples="0" shadowsize="0" numslices="16" numstacks="2"/>
    <headlight active="1" ambient="{ambient}" diffuse="0 0 0" specular="0 0 0"/>
    <map znear="0.1" zfar="10"/>
  </visual>
  <default>
    <geom solref="0.01 1"/>
    <default class="drawn"><geom contype="0" conaffinity="0" mass="0"/></default>
    <default class="block"><geom condim="4" friction="0.8 0.01 0.0001" mass="0"/></default>
    <default class="pad"><geom condim="4" friction="1.5 0.02 0.0001" mass="0"/></default>
  </default>
  <asset>{table_assets}</asset>
  <worldbody>
    <light directional="true" castshadow="false" dir="{numbers(variant.light_direction)}" diffuse="{light}"
      specular="0 0 0" ambient="0 0 0"/>
    <body name="viewer" pos="{numbers(LOOK_AT)}">{camera_xml(variant)}</body>
    {table_geom}
    <geom name="table" type="plane" size="1 1 0.1" group="3" condim="4" friction="0.8 0.01 0.0001"/>
    {plates}
    <body name="carriage" gravcomp="1">
      <inertial pos="0 0 0" mass="0.5" diaginertia="1e-3 1e-3 1e-3"/>
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <geom type="cylinder" size="0.022 0.0005" pos="0 0 0.0025" rgba="0.25 0.25 0.25 1" class="drawn"/>
      <body name="gripper" gravcomp="1">
        <inertial pos="0 0 0" mass="0.5" diaginertia="1e-3 1e-3 1e-3"/>
        <joint name="z" type="slide" axis="0 0 1"/>
        <geom name="palm" type="box" size="0.052 0.013 0.01" pos="0 0 {palm_z + 0.01:.5g}" rgba="0.93 0.93 0.95 1"
          class="pad"/>
        <geom type="cylinder" size="0.012 0.1" pos="0 0 {palm_z + 0.12:.5g}" rgba="0.4 0.4 0.43 1" class="drawn"/>
        {finger_xml("left", -1)}
        {finger_xml("right", 1)}
      </body>
    </body>
    {"".join(block_xml(slot) for slot in range(MAX_BLOCKS))}
  </worldbody>
  <contact>
    <exclude body1="gripper" body2="left"/>
    <exclude body1="gripper" body2="right"/>
    <exclude body1="left" body2="right"/>
  </contact>
  <equality><joint joint1="left" joint2="right" polycoef="0 1 0 0 0" solref="0.01 1"/></equality>
  <tendon><fixed name="opening"><joint joint="left" coef="1"/><joint joint="right" coef="1"/></fixed></tendon>
  <actuator>
    <velocity joint="x" kv="100"/>
    <velocity joint="y" kv="100"/>
    <velocity joint="z" kv="100"/>
    <position tendon="opening" kp="300" forcerange="{-GRIP_FORCE_N} {GRIP_FORCE_N}"/>
  </actuator>
</mujoco>"""
