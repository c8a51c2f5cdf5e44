"""openpi's messages: the very bytes of its client, and what is refused."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from wav.errors import DataError
from wav.serving.wire import pack, unpack

# packed by openpi-client 0.1.2
OPENPI = bytes.fromhex(
    "84b16f62736572766174696f6e2f696d61676584c40b5f5f6e6461727261795f5fc3c40464617461c40c000102030405060708090a0bc405"
    "6474797065a37c7531c405736861706593020203b16f62736572766174696f6e2f737461746584c40b5f5f6e6461727261795f5fc3c40464"
    "617461c410000000000000f83f00000000000000c0c4056474797065a33c6638c40573686170659102a17883c40d5f5f6e7067656e657269"
    "635f5fc3c40464617461cb4004000000000000c4056474797065a33c6634a670726f6d7074a46c696674"
)
MESSAGE = {
    "observation/image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    "observation/state": np.array([1.5, -2.0]),
    "x": np.float32(2.5),
    "prompt": "lift",
}


def array(**changes: object) -> bytes:
    form = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({"a": form | {key.encode(): value for key, value in changes.items()}})


def test_the_bytes_are_openpis() -> None:
    assert pack(MESSAGE) == OPENPI
    read = unpack(OPENPI)
    assert read["prompt"] == "lift"
    assert read["x"] == np.float32(2.5)
    assert isinstance(read["x"], np.float32)
    for name in ("observation/image", "observation/state"):
        np.testing.assert_array_equal(read[name], MESSAGE[name])
        assert read[name].dtype == MESSAGE[name].dtype


@pytest.mark.parametrize(
    "value", ["text", np.str_("text"), np.array(["a", "bcd"]), np.arange(3, dtype=">i4"), np.ones(())]
)
def test_valid_input_comes_back(value: object) -> None:
    np.testing.assert_array_equal(unpack(pack({"a": value}))["a"], value)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (array(dtype="|O"), "dtype is not one of"),
        (array(dtype="<c8"), "dtype is not one of"),
        (array(dtype="f4,i4"), "dtype is not one of"),
        (array(dtype="(2,)f4"), "dtype is not one of"),
        (array(dtype=["a"]), "dtype is not one of"),
        (array(dtype="<U0"), "no size"),
        (array(dtype="<U1", data=b"\xff" * 8), "no character"),
        (array(dtype=">U1", data=b"\xff" * 8), "no character"),
        (array(dtype="<U2", data="a\ud800".encode("utf-32-le", "surrogatepass"), shape=[]), "no character"),
        (array(shape=[3]), "8 bytes are not"),
        (array(shape=[-1]), "sizes of 0 and more"),
        (array(shape=[2**62, 2**62]), "8 bytes are not"),
        (array(shape=[True, 2]), "sizes of 0 and more"),
        (array(shape=[1] * 40 + [2]), "at most 8 sizes"),
        (array(shape="2"), "needs data"),
        (array(data="text"), "needs data"),
        (array()[:-3], "while reading msgpack"),
        (array() + b"\0", "while reading msgpack"),
        (b"", "while reading msgpack"),
        (msgpack.packb([1]), "list where an observation"),
        (msgpack.packb({1: 2}), "while reading msgpack"),
        (msgpack.packb({"a": msgpack.ExtType(4, b"1")}), "while reading msgpack"),
        (msgpack.packb({"a": [[]] * 300}), "more than 256 maps and lists"),
        (msgpack.packb({"a": [0] * 2000}), "while reading msgpack"),
        (b"\x91" * 2000 + b"\x90", "while reading msgpack|more than 256"),
    ],
)
def test_what_is_no_observation_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(DataError, match=match):
        unpack(data)


def test_objects_are_not_sent() -> None:
    with pytest.raises(TypeError, match="is not part of the protocol"):
        pack({"a": object()})
