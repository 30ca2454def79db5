"""The robot's side of `lapa serve`: numpy, msgpack and websockets, no torch.

    with PolicyClient("192.168.1.5", 8000, token=os.environ["LAPA_SERVE_TOKEN"]) as client:
        safety = SafetyLayer(SafetyLimits(action_low=..., action_high=..., control_hz=10))
        with Watchdog(safety, lambda reason: robot.hold()):
            while True:
                captured_at_s = time.monotonic()
                observation = read_robot()
                safety.check_observation(observation, captured_at_s)
                for action in client.actions(observation, "put the cup on the plate")[:4]:
                    safety.check_observation({}, captured_at_s)  # is what the chunk was made from still fresh?
                    robot.send(safety.bound(action))
                    time.sleep(0.1)

A request that fails is not repeated: the robot has moved on meanwhile. `SafetyStop` and `ConnectionError` end the
loop, and the watchdog's block then holds the robot. The robot's limits are its own; `client.limits` are what the server
bounds by, to compare.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from policies.serving.protocol import INSTALL, PROTOCOL, VERSION, ProtocolError, pack, unpack
from policies.serving.safety import SafetyLimits


class PolicyClient:
    """One connection to a policy server.

    Args:
        token: of the server; None on the same machine.
        timeout_s: to connect and for each answer.
        secure: TLS, where a proxy before the server ends it.

    Raises:
        ConnectionError: where nothing answers, the token is refused, or another protocol is spoken.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        timeout_s: float = 2.0,
        secure: bool = False,
    ) -> None:
        try:
            from websockets.exceptions import WebSocketException
            from websockets.sync.client import connect
        except ImportError:
            raise ImportError(INSTALL) from None
        self.timeout_s, self._failures = timeout_s, (WebSocketException, OSError)
        address = f"{'wss' if secure else 'ws'}://{host}:{port}"
        headers = {"Authorization": f"Bearer {token}"} if token else None
        try:
            # No proxy: a robot's commands must not leave by an environment variable's way.
            self._connection = connect(
                address,
                additional_headers=headers,
                open_timeout=timeout_s,
                compression=None,
                max_size=2**24,
                proxy=None,
            )
        except self._failures as error:
            raise ConnectionError(f"no policy server at {address}: {error}") from None
        self.metadata: dict[str, Any] = self._receive()
        if (self.metadata.get("protocol"), self.metadata.get("version")) != (PROTOCOL, VERSION):
            self.close()
            raise ConnectionError(
                f"{address} speaks {self.metadata.get('protocol')} {self.metadata.get('version')}, "
                f"expected {PROTOCOL} {VERSION}: install the same version on both sides"
            )

    @property
    def limits(self) -> SafetyLimits:
        """The server's limits of this embodiment, for the robot's own safety layer."""
        return SafetyLimits.from_dict(self.metadata["limits"])

    def actions(self, observation: Mapping[str, Any], task: str) -> np.ndarray:
        """Actions (T, A) for an observation: images (H, W, 3) uint8, states (S,), by the names of `metadata`.

        ConnectionError where the server refuses or does not answer in time; the connection is closed then.
        """
        try:
            self._connection.send(pack({**observation, "task": task}))
            return np.asarray(self._receive()["actions"])
        except ConnectionError:
            raise
        except (*self._failures, KeyError, ProtocolError) as error:
            self.close()
            raise ConnectionError(f"the policy server is gone, or sent what is no answer: {error}") from None
        except BaseException:
            # An answer that comes later must not be taken for the next one.
            self.close()
            raise

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._connection.recv(timeout=self.timeout_s)
        except TimeoutError:
            self.close()
            raise ConnectionError(f"the policy server did not answer within {self.timeout_s} s") from None
        except self._failures as error:
            raise ConnectionError(f"the policy server is gone: {error}") from None
        if isinstance(message, str):
            self.close()
            raise ConnectionError(f"the policy server refused: {message}")
        return unpack(message)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()
