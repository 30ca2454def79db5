"""Options of the simulated robot, as `--robot.type=simulated_tabletop --robot.<option>=...`."""

from dataclasses import dataclass

from lerobot.robots.config import RobotConfig


@RobotConfig.register_subclass("simulated_tabletop")
@dataclass(kw_only=True)
class SimulatedTabletopConfig(RobotConfig):
    """A tabletop task in MuJoCo behind LeRobot's robot interface, with the faults of real ones on request.

    family, seed, split, image_size, num_blocks_min, num_blocks_max, variant: of the scene, as in `lapa evaluate`.
    latency_steps: control steps by which observations lag behind.
    dropped_frame_share: of the frames that are the one before again.
    nan_share: of the observations whose state is not a number.
    fault_seed: of the faults.
    """

    family: str = "reach"
    seed: int = 0
    split: str = "train"
    image_size: int = 64
    num_blocks_min: int = 4
    num_blocks_max: int = 8
    variant: str = "default"
    latency_steps: int = 0
    dropped_frame_share: float = 0.0
    nan_share: float = 0.0
    fault_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latency_steps < 0:
            raise ValueError(f"latency_steps is {self.latency_steps}, expected 0 or more control steps")
        for name in ("dropped_frame_share", "nan_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")
