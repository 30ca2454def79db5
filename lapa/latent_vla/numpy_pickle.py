"""Pickled trees of numpy arrays, read without running anything that the file names.

The released image tokenizer (`vqgan`) is a raw pickle, and unpickling runs whatever callables a file names. Here
the handful of names that pickled numpy arrays need stand for classes of this module, which only check and keep
what they are given; any other name ends the reading before it is looked up.
"""

import pickle
import re
from pathlib import Path

import numpy as np

PLAIN_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


class PickledDtype:
    """Stands for numpy.dtype: plain numbers only, no objects and no fields."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not isinstance(code, str) or not PLAIN_NUMBERS.fullmatch(code):
            raise ValueError(f"an array of dtype {code!r}; only plain numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state) -> None:
        _, order, *structure = state
        if order not in ("<", ">", "|", "=") or any(part is not None for part in structure[:3]):
            raise ValueError(f"an array of a structured dtype {state!r}; only plain numbers are read")
        self.dtype = self.dtype.newbyteorder(order)


class PickledArray:
    """Stands for numpy.ndarray; `array` is set once the pickle has given shape and bytes."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = array_from_bytes(data, dtype, shape, "F" if is_fortran else "C").array


def array_from_bytes(data, dtype, shape, order="C") -> PickledArray:
    """The array of `shape` whose numbers are `data`, in this machine's byte order; ValueError where they do not fit."""
    if not isinstance(dtype, PickledDtype) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise ValueError("an array that is not plain numbers; only those are read")
    pickled = PickledArray()
    stored = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    pickled.array = stored.astype(stored.dtype.newbyteorder("="))
    return pickled


def empty_array(kind, shape, code) -> PickledArray:
    """Stands for numpy's _reconstruct, which makes an empty array to be filled by its state."""
    if kind is not PickledArray:
        raise ValueError(f"an array of class {kind!r}; only numpy.ndarray is read")
    return PickledArray()


def scalar(dtype, data) -> PickledArray:
    return array_from_bytes(data, dtype, ())


def encode(text: str, encoding: str) -> bytes:
    """Stands for _codecs.encode, in which protocol 2 wraps bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}; only latin1 is read")
    return text.encode("latin1")


# numpy 2 renamed numpy.core; both names are in circulation.
ALLOWED = {("numpy", "ndarray"): PickledArray, ("numpy", "dtype"): PickledDtype, ("_codecs", "encode"): encode} | {
    (f"numpy.{core}.{module}", name): stand_in
    for core in ("core", "_core")
    for module, name, stand_in in (
        ("multiarray", "_reconstruct", empty_array),
        ("multiarray", "scalar", scalar),
        ("numeric", "_frombuffer", array_from_bytes),
    )
}


class ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise ValueError(f"it names {module}.{name}; a tree of numpy arrays has no need of that, so it is refused")
        return ALLOWED[module, name]


def read_numpy_pickle(path: str | Path):
    """The pickled tree: dicts, lists and tuples of numpy arrays, text and numbers.

    Raises ValueError for a file that is no pickle or that names anything else; nothing it names is run.
    """
    try:
        with Path(path).open("rb") as file:
            return unwrap(ArrayUnpickler(file).load())
    except OSError:
        raise
    except Exception as error:
        # A damaged pickle fails in as many ways as there are opcodes.
        raise ValueError(f"{path} was not read: {error or type(error).__name__}") from None


def unwrap(value):
    """Replace the stand-ins by their arrays."""
    if isinstance(value, dict):
        return {unwrap(key): unwrap(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(unwrap(item) for item in value)
    if isinstance(value, PickledArray) and value.array is not None:
        return value.array[()] if value.array.ndim == 0 else value.array
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    raise ValueError(f"it holds a {type(value).__name__}; only arrays, dicts, lists, text and numbers are read")


def flatten_arrays(tree, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a tree by path, as {"encoder/Conv_0/kernel": array}; numbers become arrays, text is an error."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {
            path: array
            for name, item in items
            for path, array in flatten_arrays(item, f"{prefix}/{name}" if prefix else str(name)).items()
        }
    if not isinstance(tree, np.ndarray | np.generic | bool | int | float):
        raise ValueError(f"{prefix or 'the tree'} is a {type(tree).__name__}, expected an array")
    return {prefix: np.asarray(tree)}
