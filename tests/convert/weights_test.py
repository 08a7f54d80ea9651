# SPDX-License-Identifier: Apache-2.0
"""Reading .safetensors: every dtype, and an error for every malformed file."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from localglobal_jax.convert import weights


def test_every_dtype_is_read_as_it_stands_in_the_file(tmp_path):
    """The file is written by hand, by the format's description, so that nothing checks itself."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2, (2, 3, 5)).astype(dtype)
        for name, dtype in {
            **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
            **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
            **{"U8": np.uint8, "BOOL": np.bool_},
        }.items()
    }
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, array in arrays.items():
        places = [at, at + array.nbytes]
        entries[name] = {"dtype": name, "shape": array.shape, "data_offsets": places}
        at += array.nbytes
    entries |= {
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [at, at]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [at, at + 4]},
    }
    arrays |= {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(3.0, np.float32)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(_file(entries, b"".join(array.tobytes() for array in arrays.values())))
    read = weights.read_safetensors(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def _file(header, data=b"\0" * 8):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def _entry(**change):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


def _two(dtype, size, start, stop):
    return _entry() | {"b": {"dtype": dtype, "shape": [size], "data_offsets": [start, stop]}}


MALFORMED = {
    "empty": b"",
    "header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "header of nothing": _file(b""),
    "not JSON": _file(b"{'a': 1}"),
    "not text": _file(b"\xff\xfe\x00"),
    "brackets without end": _file(b"[" * 100_000),
    "the longest header": (2**63).to_bytes(8, "little") + b"{}",
    "a longer header": b"\xff" * 8 + b"{}",
    "infinite offsets": _file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e999]}}'),
    "infinite shape": _file(
        b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}'
    ),
    "fractions": _file(_entry(shape=[2.5])),
    "text for numbers": _file(_entry(shape=["2"])),
    "true for one": _file(_entry(shape=[True, 2])),
    "a list for a dtype": _file(_entry(dtype=["F32"])),
    "an endless name of a dtype": _file(_entry(dtype="F32" * 100_000)),
    "a thousand dimensions": _file(_entry(shape=[1] * 1000 + [2])),
    "overlap": _file(_two("F32", 1, 4, 8)),
    "one inside another": _file(_two("U8", 2, 2, 4)),
    "not an object": _file([1, 2]),
    "entry is no object": _file({"a": 3}),
    "unknown dtype": _file(_entry(dtype="F7")),
    "a dtype that NumPy does not have": _file(_entry(dtype="F8_E4M3", shape=[8])),
    "no shape": _file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "shape and bytes disagree": _file(_entry(shape=[3])),
    "negative shape": _file(_entry(shape=[-1, -2])),
    "huge shape": _file(_entry(shape=[1 << 40, 1 << 40])),
    "outside the file": _file(_entry(data_offsets=[8, 16])),
    "before the data": _file(_entry(data_offsets=[-8, 0])),
    "backwards": _file(_entry(data_offsets=[8, 0])),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(MALFORMED[case])
    with pytest.raises(ValueError, match=r"x\.safetensors") as error:
        weights.read_safetensors(path)
    assert len(str(error.value)) < 1000


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_a_damaged_file_is_refused_or_has_the_right_names(position, byte, cut, tmp_path_factory):
    whole = bytearray(save({"first": np.arange(6.0).reshape(2, 3), "second": np.ones(2, np.int8)}))
    whole[position % len(whole)] = byte
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(whole[: len(whole) - cut % 20])
    try:
        read = weights.read_safetensors(path)
    except ValueError:
        return
    for array in read.values():  # every byte can be touched
        np.asarray(array).tobytes()


def test_transforms_are_those_of_the_two_conventions():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    np.testing.assert_allclose(x @ weights.dense(w), np.einsum("bi,oi->bo", x, w))
    assert weights.dense(w[..., None, None]).shape == (3, 5)
    kernel = rng.normal(size=(5, 3, 2, 4))
    assert weights.convolution(kernel)[1, 3, 2, 4] == kernel[4, 2, 1, 3]
    kernel = rng.normal(size=(6, 1, 2, 3))
    assert weights.depthwise(kernel)[1, 2, 5] == kernel[5, 0, 1, 2]
