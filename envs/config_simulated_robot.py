"""Options that all simulated robots share, as `--robot.<option>=...`."""

from dataclasses import dataclass

from lerobot.robots.config import RobotConfig


@dataclass(kw_only=True)
class SimulatedRobotConfig(RobotConfig):
    """A simulated task behind LeRobot's robot interface, with the faults of real robots on request.

    family, seed, image_size, and what a suite adds: of the scene, as in `lapa evaluate`.
    latency_steps: control steps by which observations lag behind.
    dropped_frame_share: of the frames that are the one before again.
    nan_share: of the observations whose state is not a number.
    fault_seed: of the faults.
    one_scene: the first scene stays, whatever happens in it, as on a real table: no recorded episode then jumps from a
        scene that ended into the next one. Nothing is counted.
    """

    family: str
    seed: int = 0
    image_size: int = 64
    latency_steps: int = 0
    dropped_frame_share: float = 0.0
    nan_share: float = 0.0
    fault_seed: int = 0
    one_scene: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latency_steps < 0:
            raise ValueError(f"latency_steps is {self.latency_steps}, expected 0 or more control steps")
        for name in ("dropped_frame_share", "nan_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")
