"""What stands between a policy and a robot: limits of each action, of its change, and reasons to stop.

    safety = SafetyLayer(limits)
    safety.check_observation(observation, captured_at_s)      stale or not finite: stop
    command = safety.bound(action)                            limited, or stop
    safety.require_fresh()                                    the watchdog: no command for too long: stop

A stop is latched: every later call raises `SafetyStop` until `reset()`, which a human calls. numpy alone, so that it
runs on the robot's own computer. Units are those of the robot's actions (metres, radians).

Shapes: A action dimensions.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


class SafetyStop(RuntimeError):
    """The robot must hold still; `reason` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class SafetyLimits:
    """Limits of one embodiment.

    action_low, action_high: (A,) bounds of each dimension.
    max_rate: (A,) largest change of the commanded value a second; empty: none. For actions that are changes
        themselves (`relative`), the action times control_hz is what is limited.
    control_hz: commands a second.
    max_observation_age_s: of an observation when it is acted on; 0: not checked.
    watchdog_s: longest time without a command; 0: none.
    on_limit: clip (the action is moved to the limit) or stop.
    """

    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_rate: tuple[float, ...] = ()
    relative: bool = False
    control_hz: float = 10.0
    max_observation_age_s: float = 0.5
    watchdog_s: float = 1.0
    on_limit: str = "clip"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SafetyLimits":
        """Limits from plain values, with lists where this class has tuples."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def __post_init__(self) -> None:
        low, high, rate = (np.asarray(values, float) for values in (self.action_low, self.action_high, self.max_rate))
        if low.ndim != 1 or not len(low) or low.shape != high.shape:
            raise ValueError(
                f"action_low has {low.size} and action_high {high.size} numbers, expected one an action dimension"
            )
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError(f"action_low {low.tolist()} must be finite and below action_high {high.tolist()}")
        if rate.size and (rate.shape != low.shape or not np.isfinite(rate).all() or not (rate > 0).all()):
            raise ValueError(f"max_rate is {rate.tolist()}, expected {len(low)} positive numbers, or none")
        if not (self.control_hz > 0 and np.isfinite(self.control_hz)):
            raise ValueError(f"control_hz is {self.control_hz}, expected commands a second, above 0")
        for name in ("max_observation_age_s", "watchdog_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected seconds, or 0 for off")
        if self.on_limit not in ("clip", "stop"):
            raise ValueError(f"on_limit is {self.on_limit!r}, expected clip or stop")


@dataclass
class SafetyCounts:
    """What the layer did so far."""

    num_commands: int = 0
    num_clipped: int = 0  # commands moved to a bound
    num_slowed: int = 0  # commands whose change was cut
    num_stops: int = 0


@dataclass
class SafetyLayer:
    """Checks observations and bounds actions of one robot; thread-safe.

    Args:
        clock: seconds, monotonic; observations are stamped with the same clock.
    """

    limits: SafetyLimits
    clock: Callable[[], float] = time.monotonic
    counts: SafetyCounts = field(default_factory=SafetyCounts)
    stopped: str | None = None

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._low = np.asarray(self.limits.action_low, float)
        self._high = np.asarray(self.limits.action_high, float)
        self._last: np.ndarray | None = None
        self._last_time: float | None = None

    def reset(self, current: np.ndarray | None = None) -> None:
        """Allow commands again. `current` (A,): the robot's present position, from which rates of absolute actions are
        counted; without it the first command is bounded but not slowed.
        """
        with self._lock:
            self.stopped = None
            self._last = None if current is None else self._finite(current, "the current position")
            self._last_time = None

    def stop(self, reason: str) -> SafetyStop:
        """Latch a stop and return the exception to raise."""
        with self._lock:
            if self.stopped is None:
                self.stopped = reason
                self.counts.num_stops += 1
            return SafetyStop(self.stopped)

    def check_observation(self, observation: Mapping[str, object], captured_at_s: float) -> None:
        """SafetyStop where the observation is too old, from the future, or holds a number that is not finite."""
        with self._lock:
            self._require_running()
            age_s = self.clock() - captured_at_s
            limit_s = self.limits.max_observation_age_s
            if limit_s and not -limit_s <= age_s <= limit_s:
                raise self.stop(f"the observation is {age_s:.3f} s old, allowed are {limit_s} s")
            for name, value in observation.items():
                array = np.asarray(value)
                if array.dtype.kind in "fc" and not np.isfinite(array).all():
                    raise self.stop(f"{name} of the observation holds a number that is not finite")

    def bound(self, action: np.ndarray) -> np.ndarray:
        """The action (A,) float64 to send, within bounds, no faster than allowed; SafetyStop where it must not act."""
        with self._lock:
            self._require_running()
            wanted = self._finite(action, "the action")
            bounded = np.clip(wanted, self._low, self._high)
            clipped = bool((bounded != wanted).any())
            command = self._slowed(bounded)
            slowed = bool((command != bounded).any())
            if (clipped or slowed) and self.limits.on_limit == "stop":
                raise self.stop(f"the action {wanted.tolist()} is beyond the limits; allowed was {command.tolist()}")
            self.counts.num_commands += 1
            self.counts.num_clipped += clipped
            self.counts.num_slowed += slowed
            self._last, self._last_time = command, self.clock()
            return command

    def require_fresh(self) -> None:
        """The watchdog: SafetyStop where the last command is older than allowed. Call it in the robot's own loop."""
        with self._lock:
            self._require_running()
            if not self.limits.watchdog_s or self._last_time is None:
                return
            silence_s = self.clock() - self._last_time
            if silence_s > self.limits.watchdog_s:
                raise self.stop(f"no command for {silence_s:.3f} s, allowed are {self.limits.watchdog_s} s")

    def _require_running(self) -> None:
        if self.stopped is not None:
            raise SafetyStop(self.stopped)

    def _finite(self, values: np.ndarray, what: str) -> np.ndarray:
        array = np.array(values, dtype=float)
        if array.shape != self._low.shape:
            raise self.stop(f"{what} has shape {array.shape}, expected {self._low.shape}")
        if not np.isfinite(array).all():
            raise self.stop(f"{what} {array.tolist()} is not finite")
        return array

    def _slowed(self, action: np.ndarray) -> np.ndarray:
        if not self.limits.max_rate:
            return action
        # A command that is late may not move the robot further, and one that is early must move it less.
        period_s = 1 / self.limits.control_hz
        elapsed_s = period_s if self._last_time is None else min(period_s, self.clock() - self._last_time)
        step = np.asarray(self.limits.max_rate, float) * max(0.0, elapsed_s)
        if self.limits.relative:
            return np.clip(action, -step, step)
        if self._last is None:
            return action
        return np.clip(action, self._last - step, self._last + step)


class Watchdog:
    """Calls `on_stop(reason)` once: where the safety layer is stopped or silent for too long, or its block fails.

    A thread of its own does that, which stops a robot whose policy hangs: the loop that asks for actions would hang
    with it. `on_stop` is called again until it returns without an exception.
    """

    def __init__(self, safety: SafetyLayer, on_stop: Callable[[str], None], every_s: float = 0.02):
        self.safety, self.on_stop, self.every_s = safety, on_stop, every_s
        self._finished = threading.Event()
        self._told = False
        self._telling = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _watch(self) -> None:
        while not self._finished.wait(self.every_s):
            try:
                self.safety.require_fresh()
            except SafetyStop as stop:
                if self._tell(stop.reason):
                    return

    def _tell(self, reason: str) -> bool:
        with self._telling:
            if not self._told:
                try:
                    self.on_stop(reason)
                except Exception:
                    log.exception("stopping the robot failed; trying again")
                    return False
                self._told = True
            return True

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._finished.set()
        self._thread.join()
        if error is not None or self.safety.stopped is not None:
            self._tell(self.safety.stopped or f"the loop ended with {error!r}")
