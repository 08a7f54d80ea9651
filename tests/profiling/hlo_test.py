# SPDX-License-Identifier: Apache-2.0
"""Texts of programs: really compiled here for two CPU devices, or by libtpu, stored."""

import gzip
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from localglobal_jax.profiling import collectives, hlo

WHOLE, ROWS = PartitionSpec(), PartitionSpec("data")
GOLDEN = pathlib.Path(__file__).parent.parent / "golden/plan_v5e.txt.gz"


def compiled(function, *shapes, out=WHOLE):
    """The program of a function of arrays split over two devices by rows."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    where = NamedSharding(mesh, ROWS)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for shape in shapes]
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, out))
    return hlo.Program(jitted.lower(*args).compile().as_text())


@pytest.fixture(scope="module")
def stored():
    """Two matrices, one in a scan of 5, data parallel on v5e:2x2, the second matrix split."""
    return hlo.Program(gzip.decompress(GOLDEN.read_bytes()).decode())


def test_sum_over_devices_is_one_all_reduce():
    program = compiled(lambda x: x.sum(0), (8, 1000))
    (found,) = collectives.collectives(program)
    assert (found.op, found.dtype, found.shape, found.group) == ("all-reduce", "f32", (1000,), 2)
    assert (found.payload, found.wire, found.count) == (4000, 4000, 1)


def test_gather_sends_what_is_missing():
    program = compiled(lambda x: x + 1, (8, 1000))
    (found,) = collectives.collectives(program)
    assert (found.op, found.payload, found.wire) == ("all-gather", 32_000, 16_000)


@pytest.mark.parametrize("length", [3, 11])
def test_loops_count_as_often_as_they_run(length):
    def function(x):
        return jax.lax.fori_loop(0, length, lambda i, h: jnp.tanh(h + x.sum(0) * h.sum()), x[0])

    def body_sends(x):
        def body(h, _):
            return h + jnp.roll(h, 1, 0), None

        return jax.lax.scan(body, x, None, length=length)[0]

    assert set(compiled(function, (8, 64)).trips.values()) == {length}
    program = compiled(body_sends, (8, 64), out=ROWS)
    assert {c.op for c in collectives.collectives(program)} == {"collective-permute"}
    assert {c.count for c in collectives.collectives(program)} == {length}


def test_a_loop_that_says_not_how_long_is_counted_once():
    def function(x):
        return jax.lax.while_loop(lambda h: h.sum() > 1, lambda h: h / 2, x)

    program = compiled(function, (8, 64))
    assert list(program.trips.values()) == [None]
    assert set(program.scheduled.values()) == {1}


def test_traffic_is_what_goes_in_and_out():
    program = compiled(lambda x: jnp.tanh(x) * 2, (8, 1000), out=ROWS)
    assert sum(size * n for _, size, n in program.traffic()) == 2 * 4 * 1000 * 4

    # in a loop that takes a row at a time, a row is read and a row is written
    def rows(x):
        return jax.lax.map(jnp.tanh, x)

    program = compiled(rows, (2, 1000), out=WHOLE)
    loop = {name for name, n in program.scheduled.items() if n == 2}
    moved = sum(
        size for i, size, n in program.traffic() if n == 2 and i in program.instructions[min(loop)]
    )
    assert moved < 4 * 4 * 1000


# One image of eight is read and replaced, as libtpu writes it: fusions that hold fusions.
IN_PLACE = """HloModule tiles, is_scheduled=true

%cut (p0: bf16[8,64], p1: s32[]) -> bf16[1,64] {
  %p0 = bf16[8,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
}

%put (p0: bf16[8,64], p1: bf16[1,64], p2: s32[]) -> bf16[8,64] {
  %p0 = bf16[8,64]{1,0} parameter(0)
  %p1 = bf16[1,64]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = bf16[8,64]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%outer (p0: bf16[8,64], p1: s32[], p2: bf16[8,64]) -> (bf16[8,64], bf16[64]) {
  %p0 = bf16[8,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[8,64]{1,0} parameter(2)
  %part = bf16[1,64]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%cut
  %whole = bf16[8,64]{1,0} bitcast(%p2)
  %sum = bf16[64]{0} bitcast(%part)
  %new = bf16[8,64]{1,0} fusion(%whole, %part, %p1), kind=kLoop, calls=%put
  ROOT %both = (bf16[8,64]{1,0}, bf16[64]{0}) tuple(%new, %sum)
}

ENTRY %main (x: bf16[8,64], i: s32[], y: bf16[8,64]) -> (bf16[8,64], bf16[64]) {
  %x = bf16[8,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = bf16[8,64]{1,0} parameter(2)
  ROOT %f = (bf16[8,64]{1,0}, bf16[64]{0}) fusion(%x, %i, %y), kind=kOutput, calls=%outer
}
"""


def test_slices_inside_fusions_of_fusions_move_their_own_bytes():
    ((_, moved, runs),) = hlo.Program(IN_PLACE).traffic()
    image, index = 64 * 2, 4
    assert runs == 1
    assert moved == image + index + 2 * image + image  # a slice, the update, the other result


def test_an_array_that_a_fusion_also_reads_as_a_whole_counts_as_a_whole():
    also = IN_PLACE.replace("%sum = bf16[64]{0} bitcast(%part)", "%sum = bf16[64]{0} copy(%p0)")
    ((_, moved, _),) = hlo.Program(also).traffic()
    assert moved == 8 * 128 + 4 + 2 * 128 + 128


def test_what_libtpu_wrote(stored):
    assert stored.devices == 4
    assert set(stored.trips.values()) == {5}
    found = {(c.op, c.dtype, c.shape): c for c in collectives.collectives(stored)}
    assert found.keys() == {
        ("all-reduce", "f32", (256, 256)),  # gradient of the matrix that all have
        ("reduce-scatter", "f32", (64, 128)),  # of the one that is split: a fusion of libtpu
        ("all-gather", "bf16", (256, 128)),  # the split one itself
    }
    scatter = found["reduce-scatter", "f32", (64, 128)]
    assert scatter.payload == 64 * 128 * 4 and scatter.wire == 3 * scatter.payload
    assert "transpose(jvp(head))" in scatter.op_name
    assert {c.group for c in found.values()} == {4}


def test_libtpu_cycles_and_memory(stored):
    rows = list(stored.traffic())
    assert sum(i.cycles * n for i, _, n in rows) > sum(i.cycles for i, *_ in rows) > 0
    # arguments and results at least; what stays in the chip's own memory is no traffic
    kept = 256 * 256 * 4 + 64 * 128 * 4
    assert 2 * kept <= sum(size * n for _, size, n in rows) < 20 * kept


@pytest.mark.parametrize(
    ("attributes", "devices"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", [0, 1, 2]),
        ("replica_groups=[4,8]<=[32]", list(range(8))),
        ("replica_groups=[8,4]<=[4,8]T(1,0)", [0, 8, 16, 24]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", [0, 4]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}", list(range(8))),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [0, 4]),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x={}",
            [0, 1, 2, 3],
        ),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, x={}",
            [0, 4],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [0, 1]),
        ("source_target_pairs={{0,1},{7,8},{15,0}}, x", [15, 0]),  # the pair that is farthest apart
        ("replica_groups={}", list(range(32))),
    ],
)
def test_groups_in_all_notations(attributes, devices):
    i = hlo.Instruction("x", "all-reduce", (), (), "", attributes)
    assert collectives.group(i, devices=32) == devices


@pytest.mark.parametrize(
    ("op", "devices", "expected"),
    [
        ("all-reduce", range(8), 0),  # within a host of eight
        ("all-reduce", range(16), 2 * 100 * (1 / 2) / 8),  # a ring of two hosts with eight cards
        ("all-reduce", range(0, 32, 8), 2 * 100 * (3 / 4)),  # one GPU of each of four hosts
        ("all-gather", range(16), 100 * (1 / 2) / 8),
        ("reduce-scatter", range(16), 100.0),
        ("all-to-all", range(16), 100 * (1 / 2)),
        ("collective-permute", (7, 8), 100.0),
        ("collective-permute", (0, 1), 0),
    ],
)
def test_bytes_between_hosts(op, devices, expected):
    sent = collectives.Collective(op, "", "f32", (25,), tuple(devices), 100, 0.0, 1, "")
    assert sent.network(8) == pytest.approx(expected)


def test_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.Program("HloModule nothing\n")
