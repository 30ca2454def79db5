"""LeRobot's own policy server for its `robot_client`, opened to our policy and closed to the rest.

    python -m policies.serving.lerobot_async outputs/quickstart/finetune/lapa-seed0 --port 8080
    python -m lerobot.async_inference.robot_client --server_address=127.0.0.1:8080 --policy_type=lapa \\
        --pretrained_name_or_path=outputs/quickstart/finetune/lapa-seed0 --actions_per_chunk=4 \\
        --robot.type=simulated_tabletop --robot.seed=3000000 --task="move to the blue moon"

LeRobot 0.6.1 keeps a closed list of policies, unpickles what comes over the network, lets the client name any model to
load, and drops observations whose states differ by less than 1, which in metres is all of them. Here the policy is the
one that was started, only the message types are unpickled, nearness is a parameter, and the address is this machine
alone, since the protocol has no authentication.
"""

import argparse
import io
import numbers
import pickle
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from policies.serving.server import is_loopback

# What the messages of robot_client are made of; anything else could be code.
UNPICKLED = {
    "lerobot.async_inference.helpers": {"RemotePolicyConfig", "TimedObservation", "TimedAction", "TimedData"},
    "lerobot.configs.types": {"PolicyFeature", "FeatureType"},
    "numpy": {"ndarray", "dtype"},
    "numpy.dtypes": {"Float32DType", "Float64DType", "UInt8DType", "Int64DType"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "collections": {"OrderedDict"},
    "builtins": {"float", "int", "str", "bool", "tuple", "list", "dict"},
}


class MessageUnpickler(pickle.Unpickler):
    """Unpickles the message types of LeRobot's client and refuses any other global."""

    def find_class(self, module: str, name: str) -> Any:
        if name in UNPICKLED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of LeRobot's messages")


def loads(data: bytes) -> Any:
    """What `data` holds, if it is a message of LeRobot's client; UnpicklingError otherwise."""
    return MessageUnpickler(io.BytesIO(data)).load()


def build_server(policy: str | Path, nearness: float = 0.0, **options: Any):
    """LeRobot's PolicyServer for one policy folder.

    Args:
        nearness: states that differ by less, in the units of the state, are not looked at again; 0 looks at all.
        options: fields of LeRobot's PolicyServerConfig (host, port, fps, inference_latency, obs_queue_timeout).

    Raises:
        ValueError: for an address beyond this machine, or a folder that is no policy.
        ImportError: where LeRobot's async extra is not installed.
    """
    try:
        from lerobot.async_inference import policy_server
        from lerobot.async_inference.configs import PolicyServerConfig
    except ImportError as error:
        raise ImportError(f"LeRobot's async server needs its extra: pip install 'lerobot[async]' ({error})") from None
    from lerobot.utils.import_utils import register_third_party_plugins

    from policies.serving.served_policy import policy_type, refuse_foreign_code

    options = {"host": "127.0.0.1"} | options
    if not is_loopback(options["host"]):
        raise ValueError(
            f"host={options['host']} can be reached from other machines, and this protocol has no authentication: "
            "use 127.0.0.1 with an SSH tunnel, or `lapa serve`"
        )
    served_path, served_type = str(Path(policy).expanduser()), policy_type(policy)
    refuse_foreign_code(Path(served_path))
    register_third_party_plugins()
    if served_type not in policy_server.SUPPORTED_POLICIES:
        policy_server.SUPPORTED_POLICIES.append(served_type)
    policy_server.pickle = SimpleNamespace(loads=loads, dumps=pickle.dumps)  # type: ignore[attr-defined]

    class OnePolicyServer(policy_server.PolicyServer):
        """Serves the policy it was started with, whatever the client asks for."""

        def SendPolicyInstructions(self, request, context):
            wanted = loads(request.data)
            wanted.policy_type, wanted.pretrained_name_or_path = served_type, served_path
            wanted.device = "cpu" if wanted.device not in ("cpu", "cuda", "mps") else wanted.device
            request.data = pickle.dumps(wanted)
            return super().SendPolicyInstructions(request, context)

        def _obs_sanity_checks(self, obs, previous_obs) -> bool:
            with self._predicted_timesteps_lock:
                if obs.get_timestep() in self._predicted_timesteps:
                    return False
            return nearness <= 0 or farther(obs.get_observation(), previous_obs.get_observation(), nearness)

    return OnePolicyServer(PolicyServerConfig(**options))


def farther(observation: dict[str, Any], previous: dict[str, Any], nearness: float) -> bool:
    """Whether a number of the state differs by at least `nearness`."""
    return any(
        abs(float(value) - float(previous[name])) >= nearness
        for name, value in observation.items()
        if isinstance(value, numbers.Real) and name in previous
    )


def start(server) -> Any:
    """A started gRPC server for what `build_server` made; its `stop(grace)` ends it."""
    import grpc
    from lerobot.transport import services_pb2_grpc

    listener = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(server, listener)
    if not listener.add_insecure_port(f"{server.config.host}:{server.config.port}"):
        raise OSError(f"port {server.config.port} is taken: choose another")
    listener.start()
    return listener


def main() -> None:
    """`python -m policies.serving.lerobot_async <policy folder>`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("policy", help="folder of `lapa finetune`, lerobot-train or save_pretrained")
    parser.add_argument("--host", default="127.0.0.1", help="an address of this machine alone")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--fps", type=int, default=10, help="control steps a second")
    parser.add_argument("--nearness", type=float, default=0.0, help="skip states nearer than this to the last one")
    given = parser.parse_args()
    server = build_server(given.policy, given.nearness, host=given.host, port=given.port, fps=given.fps)
    listener = start(server)
    print(f"serving {given.policy} to robot_client on {given.host}:{given.port}; Ctrl-C stops", flush=True)
    try:
        listener.wait_for_termination()
    except KeyboardInterrupt:
        listener.stop(grace=2)


if __name__ == "__main__":
    main()
