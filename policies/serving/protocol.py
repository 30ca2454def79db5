"""Messages between robot and policy server: msgpack with numpy arrays, as openpi's clients send them; version 1.

    on connecting   server: {"protocol": "lapa-policy", "version": 1, "inputs": ..., "action_shape": [T, A], ...}
    observation     client: {"observation.images.top": (H, W, 3) uint8, "observation.state": (S,), "task": "..."}
                    `prompt` is read as task, and `/` in a key as `.`, so that openpi's names work
    actions         server: {"actions": (T, A) float32 in the robot's units, "server_timing": {"infer_ms": ...}}
    mistake         server, WebSocket: text, then the connection closes; HTTP: {"error": ..., "code": ...}

An array is the map {"__ndarray__": true, "data": bytes, "dtype": "<f4", "shape": [...]}, one number of numpy's types
{"__npgeneric__": true, "data": 0.5, "dtype": "<f4"}; the keys of these maps are bytes, as openpi's clients send and
expect them. Nothing is unpickled, types are from a short list, and every size is checked before memory is taken. numpy
and msgpack alone: no torch.
"""

import itertools
from typing import Any

import numpy as np

PROTOCOL, VERSION = "lapa-policy", 1
DTYPES = {"|u1", "|i1", "|b1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8"}
MAX_DIMENSIONS = 6
MAX_ENTRIES = 64  # keys of a message, and lengths of the lists in it that are no arrays
MAX_CONTAINERS = 256  # maps and lists in a message, arrays included
MAX_TEXT = 4096  # characters of an instruction
INSTALL = "server and client need msgpack, aiohttp and websockets: pip install 'lerobot_policy_lapa[serve]'"


class ProtocolError(ValueError):
    """A message that does not follow the protocol; `code` is a short name for machines."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def pack(message: Any) -> bytes:
    """The message as msgpack; numpy arrays and numbers become maps."""
    return _msgpack().packb(message, default=_encode, use_bin_type=True)


def unpack(data: bytes) -> Any:
    """A message from msgpack; ProtocolError for anything that is not one."""
    count = itertools.count(1)

    def counted(decoded: Any) -> Any:
        # Limits hold for each container; without this one, containers within containers would have none.
        if next(count) > MAX_CONTAINERS:
            raise ProtocolError("malformed", f"a message of more than {MAX_CONTAINERS} maps and lists")
        return decoded

    try:
        return _msgpack().unpackb(
            data,
            object_hook=lambda entries: _decode(counted(entries)),
            list_hook=counted,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_str_len=MAX_TEXT,
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except Exception as error:
        # msgpack raises many kinds for broken bytes; all of them mean the same to the sender.
        raise ProtocolError("malformed", f"not a msgpack message of this protocol: {type(error).__name__}") from None


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        if array.dtype.str not in DTYPES:
            raise ProtocolError("dtype", f"arrays of {value.dtype} cannot be sent, known are {sorted(DTYPES)}")
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    raise ProtocolError("type", f"{type(value).__name__} cannot be sent")


def _decode(entries: dict) -> Any:
    # openpi's packer writes the keys as bytes.
    named = {key.decode("ascii", "replace") if isinstance(key, bytes) else key: value for key, value in entries.items()}
    if "__ndarray__" not in named and "__npgeneric__" not in named:
        return named
    dtype, shape, data = named.get("dtype"), named.get("shape"), named.get("data")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ProtocolError("dtype", f"an array has dtype {str(dtype)[:20]!r}, known are {sorted(DTYPES)}")
    if "__npgeneric__" in named:
        if not isinstance(data, bool | int | float):
            raise ProtocolError("type", f"a number of numpy's holds {type(data).__name__}")
        return np.dtype(dtype).type(data)
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError("shape", "an array's shape is no list of at most 6 sizes")
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**31 for size in shape):
        raise ProtocolError("shape", "an array's shape holds something that is no size")
    expected = np.dtype(dtype).itemsize
    for size in shape:
        expected *= size
    if not isinstance(data, bytes) or len(data) != expected:
        raise ProtocolError("shape", f"an array of shape {list(shape)} and {dtype} needs {expected} bytes of data")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _msgpack():
    try:
        import msgpack
    except ImportError:
        raise ImportError(INSTALL) from None
    return msgpack


def read_observation(message: Any, inputs: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arrays and the task that a policy needs, checked; other entries are left out.

    Args:
        inputs: name and shape of each: images as (3, H, W) of the policy, any size is accepted; the rest exact.

    Returns float32 arrays, uint8 for images (H, W, 3), and `task`, a string.

    Raises:
        ProtocolError: for a missing entry, another shape or type, or a number that is not finite.
    """
    if not isinstance(message, dict):
        raise ProtocolError("malformed", f"an observation is a map, got {type(message).__name__}")
    entries = {str(key).replace("/", "."): value for key, value in message.items()}
    task = entries.get("task", entries.get("prompt"))
    if not isinstance(task, str) or len(task) > MAX_TEXT:
        raise ProtocolError("task", "the observation needs `task` (or `prompt`): the instruction, a string")
    observation: dict[str, Any] = {"task": task}
    for name, shape in inputs.items():
        if name not in entries:
            raise ProtocolError("missing", f"the observation has no {name!r}: the policy needs {sorted(inputs)}")
        try:
            array = np.asarray(entries[name])
        except ValueError:
            raise ProtocolError("shape", f"{name} is no array") from None
        if is_image(name):
            if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
                raise ProtocolError("shape", f"{name} is {array.shape}, expected (height, width, 3)")
            if array.dtype.kind not in "ui" or (array.size and not (array.min() >= 0 and array.max() <= 255)):
                raise ProtocolError("dtype", f"{name} is {array.dtype}, expected uint8")
            observation[name] = array.astype(np.uint8)
            continue
        if array.dtype.kind not in "fui" or array.shape != tuple(shape):
            raise ProtocolError("shape", f"{name} is {array.dtype} {array.shape}, expected numbers {tuple(shape)}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ProtocolError("not_finite", f"{name} holds a number that is not finite")
        observation[name] = array
    return observation


def is_image(name: str) -> bool:
    """Whether an observation's entry is a camera image, by LeRobot's names."""
    return name.startswith("observation.image")
