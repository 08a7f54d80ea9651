# SPDX-License-Identifier: Apache-2.0
"""The digest sees every bit and every position, and nothing else: no sharding, no library."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.checkpoints import digests

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "float8_e4m3fn"]
SHAPES = [(), (0,), (3, 0), (1,), (7,), (3, 5), (2, 3, 4)]


def noise(shape, dtype, seed=0):
    dtype = jnp.dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return (raw % 2 if dtype.kind == "b" else raw).view(dtype).reshape(shape)


def flipped(x, bit):
    raw = np.frombuffer(x.tobytes(), np.uint8).copy()
    raw[bit // 8] ^= np.uint8(1 << bit % 8)
    return raw.view(x.dtype).reshape(x.shape)


def of(x):
    return digests.text(digests.on_host(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_device_and_numpy_agree_whatever_the_shape(dtype):
    for shape in SHAPES:
        x = noise(shape, dtype)
        assert digests.text(digests.on_device(jnp.asarray(x))) == of(x)
        np.testing.assert_array_equal(digests.on_host(x), digests.on_host(x, block=2))


def test_eight_byte_types_agree_too():
    with jax.enable_x64(True):
        for dtype in ("float64", "int64", "uint64"):
            x = noise((3, 5), dtype)
            assert digests.text(digests.on_device(jnp.asarray(x))) == of(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "float64"])
def test_every_single_flip_is_seen(dtype):
    x = noise((3, 2), dtype)
    seen = {of(flipped(x, bit)) for bit in range(8 * x.nbytes)}
    assert of(x) not in seen
    assert len(seen) == 8 * x.nbytes


def test_flips_of_two_sign_bits_do_not_cancel():
    x = noise((64,), "float32")  # they would in a sum of weight * word
    pairs = {of(flipped(flipped(x, 31), 32 * i + 31)) for i in range(1, 64)}
    assert len(pairs | {of(x)}) == 64


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(0, 3), min_size=2, max_size=40), data=st.data())
def test_order_matters(values, data):
    x = np.array(values, np.int32)
    y = np.array(data.draw(st.permutations(values)), np.int32)
    assert (of(x) == of(y)) == (x.tolist() == y.tolist())


def test_nan_payload_and_negative_zero_are_bits_like_others():
    assert of(np.float32([0.0])) != of(np.float32([-0.0]))
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert of(nans[:1]) != of(nans[1:])


def test_an_array_may_have_more_than_2_32_words():
    large = jax.ShapeDtypeStruct((2, 2**16, 2**16), jnp.uint8)  # the stride of axis 0 is 2**32
    assert jax.eval_shape(digests.on_device, large).shape == (2,)


@pytest.mark.parametrize("leaf", [jax.random.key(0), jnp.ones(2, jnp.complex64)])
def test_what_has_no_digest_is_refused(leaf):
    with pytest.raises(ValueError, match="key_data"):
        digests.on_device(leaf)


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from localglobal_jax.checkpoints import digests
from localglobal_jax.parallel import placement
mesh = placement.make_mesh({"data": 4, "model": 2})
x = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)
for dtype in ("float32", "bfloat16", "uint8"):
    y = jax.numpy.asarray(x, dtype)
    expected = digests.text(digests.on_host(np.asarray(y)))
    for spec in (P(), P("data"), P("model", None, "data"), P(("data", "model")), P(None, "model")):
        z = jax.device_put(y, NamedSharding(mesh, spec))
        assert digests.text(jax.device_get(digests.on_device(z))) == expected, (dtype, spec)
"""


def test_sharding_does_not_matter():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", SHARDED], env=env, check=True, timeout=600)


@pytest.fixture
def listed(tmp_path):
    directory = epath.Path(tmp_path)
    (directory / "sub").mkdir()
    (directory / "sub" / "a").write_bytes(b"some bytes")
    (directory / "b").write_bytes(b"")
    digests.write_manifest(directory)
    return directory


def test_manifest_accepts_what_it_listed(listed):
    digests.check_manifest(listed)
    (listed / "notes.txt").write_text("someone's notes are no damage")
    digests.check_manifest(listed)


def test_manifest_names_the_damaged_file(listed):
    (listed / "sub" / "a").write_bytes(b"some byteS")
    with pytest.raises(ValueError, match="sub/a"):
        digests.check_manifest(listed)
    (listed / "sub" / "a").unlink()
    with pytest.raises(ValueError, match="sub/a"):
        digests.check_manifest(listed)


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_hosts_share_the_reading_and_one_of_them_names_the_damaged_file(listed, hosts):
    for host in range(hosts):
        digests.check_manifest(listed, (host, hosts))
    (listed / "sub" / "a").write_bytes(b"some byteS")
    found = []
    for host in range(hosts):
        try:
            digests.check_manifest(listed, (host, hosts))
        except ValueError as error:
            found.append(str(error))
    (one,) = found
    assert one.startswith("sub/a ")


def test_every_flip_in_the_manifest_itself_is_seen(listed):
    path = listed / digests.MANIFEST
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(bad))
        with pytest.raises(ValueError, match=r"files\.json|sub/a|b "):
            digests.check_manifest(listed)
    path.unlink()
    with pytest.raises(ValueError, match=r"files\.json"):
        digests.check_manifest(listed)


def test_large_files_are_checked_by_size(listed, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE", 4)
    digests.write_manifest(listed)
    digests.check_manifest(listed)
    (listed / "sub" / "a").write_bytes(b"some byte")
    with pytest.raises(ValueError, match="sub/a"):
        digests.check_manifest(listed)
