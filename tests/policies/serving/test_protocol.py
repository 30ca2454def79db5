import msgpack
import numpy as np
import pytest

from policies.serving.protocol import ProtocolError, pack, read_observation, unpack

INPUTS = {"observation.images.top": (3, 8, 8), "observation.state": (2,)}


def observation(**changes) -> dict:
    return {
        "observation.images.top": np.zeros((6, 7, 3), np.uint8),
        "observation.state": np.array([0.5, -0.5], np.float32),
        "task": "go",
    } | changes


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32", "float64", "bool"])
def test_arrays_come_back_as_they_were(dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    back = unpack(pack({"array": array, "text": "é", "numbers": [1, 2.5, None]}))
    assert back["array"].dtype == array.dtype and np.array_equal(back["array"], array)
    assert back["text"] == "é" and back["numbers"] == [1, 2.5, None]


def test_arrays_of_another_byte_order_or_stride_are_mended():
    array = np.arange(12, dtype=">f4").reshape(3, 4)[:, ::2]
    assert np.array_equal(unpack(pack({"a": array}))["a"], array)


def test_the_keys_of_an_array_may_be_text():
    packed = msgpack.packb({"__ndarray__": True, "data": b"\x01\x02", "dtype": "|u1", "shape": [2]})
    assert unpack(packed).tolist() == [1, 2]


@pytest.mark.parametrize(
    "entries",
    [
        {"dtype": "|O8", "shape": [1], "data": b"12345678"},
        {"dtype": "<f4", "shape": [1000000000, 1000000000], "data": b""},
        {"dtype": "<f4", "shape": [-1], "data": b""},
        {"dtype": "<f4", "shape": [True], "data": b"1234"},
        {"dtype": "<f4", "shape": [2], "data": b"1234"},
        {"dtype": "<f4", "shape": "2", "data": b"1234"},
        {"dtype": "<f4", "shape": [1] * 7, "data": b"1234"},
        {"dtype": 4, "shape": [1], "data": b"1234"},
        {},
    ],
)
def test_an_array_that_lies_about_itself_is_refused(entries):
    with pytest.raises(ProtocolError):
        unpack(msgpack.packb({"a": {"__ndarray__": True} | entries}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pack({"a": 1})[:-1],
        pack({"a": 1}) + b"x",
        msgpack.packb({1: 2}),
        msgpack.packb(list(range(65))),
        b"\x81\xa1a" + b"\x91" * 300,
    ],
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(ProtocolError):
        unpack(data)


def test_objects_cannot_be_sent():
    with pytest.raises(ProtocolError, match=r"dtype|object"):
        pack({"a": np.array([object()])})
    with pytest.raises(ProtocolError, match="cannot be sent"):
        pack({"a": object()})


def test_an_observation_is_checked_and_the_rest_left_out():
    found = read_observation(observation(extra=1), INPUTS)
    assert sorted(found) == ["observation.images.top", "observation.state", "task"]


def test_openpis_names_are_understood():
    message = {"observation/images/top": np.zeros((4, 4, 3), np.uint8), "observation/state": [1, 2], "prompt": "go"}
    found = read_observation(message, INPUTS)
    assert found["task"] == "go" and found["observation.state"].tolist() == [1.0, 2.0]


# What openpi-client 0.1.2 sends for {"observation/state": float32 [0.5, -0.5], "prompt": "go", "height": float32 0.5}.
OPENPI_MESSAGE = (
    b"\x83\xb1observation/state\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08\x00\x00\x00?\x00\x00\x00\xbf"
    b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x91\x02\xa6prompt\xa2go"
    b"\xa6height\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xcb?\xe0\x00\x00\x00\x00\x00\x00\xc4\x05dtype\xa3<f4"
)


def test_openpis_bytes_are_understood_and_our_arrays_are_the_same_bytes():
    message = unpack(OPENPI_MESSAGE)
    assert message["prompt"] == "go" and message["observation/state"].tolist() == [0.5, -0.5]
    assert message["height"] == 0.5 and message["height"].dtype == np.float32
    array = {"observation/state": np.array([0.5, -0.5], np.float32)}
    assert pack(array)[1:] == OPENPI_MESSAGE[1 : len(pack(array))]
    # Their client reads the keys of our answers as bytes, too.
    answer = msgpack.unpackb(pack({"actions": np.zeros((1, 2), np.float32)}))
    assert answer["actions"] == {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [1, 2]}


@pytest.mark.parametrize(
    "number", [{"dtype": "<U4", "data": "a"}, {"dtype": "<f4", "data": "1"}, {"dtype": "|u1", "data": 300}, {}]
)
def test_a_number_that_lies_about_itself_is_refused(number):
    with pytest.raises(ProtocolError):
        unpack(msgpack.packb({"a": {b"__npgeneric__": True} | number}))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"task": None}, "task"),
        ({"task": "x" * 5000}, "task"),
        ({"observation.images.top": np.zeros((6, 7), np.uint8)}, "shape"),
        ({"observation.images.top": np.zeros((3, 6, 7), np.uint8)}, "shape"),
        ({"observation.images.top": np.zeros((6, 0, 3), np.uint8)}, "shape"),
        ({"observation.images.top": np.zeros((6, 7, 3), np.float32)}, "dtype"),
        ({"observation.images.top": np.full((6, 7, 3), 300)}, "dtype"),
        ({"observation.state": np.zeros(3)}, "shape"),
        ({"observation.state": [1, [2]]}, "shape"),
        ({"observation.state": ["a", "b"]}, "shape"),
        ({"observation.state": np.array([np.nan, 0])}, "not_finite"),
        ({"observation.state": np.array([1e300, 0])}, "not_finite"),
    ],
)
def test_a_bad_observation_is_refused_by_its_kind(changes, code):
    with pytest.raises(ProtocolError) as error:
        read_observation(observation(**changes), INPUTS)
    assert error.value.code == code


def test_a_missing_entry_is_named():
    message = observation()
    del message["observation.state"]
    with pytest.raises(ProtocolError, match=r"no 'observation.state'"):
        read_observation(message, INPUTS)
    with pytest.raises(ProtocolError, match="a map"):
        read_observation([1], INPUTS)
