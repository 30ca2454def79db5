"""The tabletop as a LeRobot robot.

    lerobot-rollout --robot.type=simulated_tabletop --robot.seed=3000000 --policy.path=... --fps=10 --duration=6 \\
        --return_to_initial_position=false --task="move to the blue moon"

Observation: x.pos, y.pos (the tip, metres) and top (image_size, image_size, 3) uint8. Action: x.vel, y.vel, the tip's
displacement in one control step, metres; or x.pos, y.pos, a place to move towards, as LeRobot sends when it brings a
robot back to where it began.
"""

from envs.config_simulated_tabletop import SimulatedTabletopConfig
from envs.simulated_robot import SimulatedRobot


class SimulatedTabletop(SimulatedRobot):
    config_class = SimulatedTabletopConfig
    name = "simulated_tabletop"
    suite = "tabletop"
    moved_axes = ("x", "y")
