"""The gripper as a LeRobot robot.

    lerobot-rollout --robot.type=simulated_gripper --robot.family=stack --policy.path=... --fps=10 --duration=10 \\
        --return_to_initial_position=false --task="stack the red cube on the blue cube"

Observation: x.pos, y.pos, z.pos, gripper.pos (the opening), metres, and top (image_size, image_size, 3) uint8. Action:
x.vel, y.vel, z.vel, the displacement in one control step, and gripper.pos, the opening that the fingers shall have,
metres; x.pos, y.pos, z.pos are places to move towards.
"""

from envs.config_simulated_gripper import SimulatedGripperConfig
from envs.simulated_robot import SimulatedRobot


class SimulatedGripper(SimulatedRobot):
    config_class = SimulatedGripperConfig
    name = "simulated_gripper"
    suite = "gripper"
    moved_axes = ("x", "y", "z")
    set_axes = ("gripper",)
