# SPDX-License-Identifier: Apache-2.0
import gzip
import pathlib

import pytest

from localglobal_jax.profiling import lints, roofline, search, table, topologies
from localglobal_jax.profiling.collectives import Collective, wire_bytes
from localglobal_jax.profiling.compile import out_of_memory

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/plan_v5e.txt.gz"
V5E = topologies.parse("v5e:2x2")
FACTS = {
    "batch": "64 images",
    "items": 64,
    "items_name": "images",
    "rows": 64,
    "micro_batches": 1,
    "mesh": {"data": 4},
    "parameters": 98_304,
    "parameter_bytes": 393_216,
    "split_parameter_bytes": 196_608,
    "trained_parameter_bytes": 98_304,
    "least": {"multiply_adds": 5 * 10**8, "kept": 400_000},
    "parameter_sizes": [65_536, 32_768],
    "multiply_adds": 10**9,
    "model_multiply_adds": 8 * 10**8,
    "arguments": {"parameters": 300_000, "batch": 10_000},
    "parts": ["head", "stage1"],
    "memory": {
        "arguments": 311_296,
        "output": 295_424,
        "alias": 294_912,
        "temporary": 1000,
        "code": 2000,
        "peak": 0,
    },
    "compile_cpu_seconds": 1.0,
    "compile_peak_bytes": 2**30,
}


def sent(op="all-reduce", shape=(4, 1000), *, dtype="f32", op_name="", count=1, key="1"):
    size = {"f32": 4, "bf16": 2}[dtype]
    for n in shape:
        size *= n
    return Collective(
        op, key, dtype, shape, (0, 1, 2, 3), size, wire_bytes(op, size, 4), count, op_name
    )


@pytest.fixture
def built():
    text = gzip.decompress(GOLDEN.read_bytes()).decode()
    about = {"config": "x.py", "step": "train", "strategy": "fsdp"}
    return {**about, **roofline.build(FACTS, text, V5E)}


def test_bounds_are_consistent(built):
    ms, step = built["bounds_ms"], built["step_ms"]
    assert step["low"] == max(ms.values()) <= step["high"]
    assert ms["compute"] == pytest.approx(1e3 * 2 * 10**9 / 4 / 197e12)
    assert built["items_per_second"]["high"] == pytest.approx(64e3 / step["low"])
    assert 0 < built["mfu"]["low"] <= built["mfu"]["high"] <= 1
    # work that the program repeats takes time, but is none of the model
    assert built["mfu"]["high"] == pytest.approx(0.8 * ms["compute"] / step["low"])
    assert built["wire_bytes"] == sum(row["wire"] for row in built["collectives"])
    for share in ("cycles_share", "bytes_share"):
        assert sum(row[share] for row in built["layers"]) == pytest.approx(1)


def test_perfect_fusion_beside_the_program(built):
    found = built["perfect_fusion"]
    held, kept = FACTS["arguments"], FACTS["least"]["kept"]
    # no optimizer: nothing is written but what the backward pass needs
    assert found["bytes"] == sum(held.values()) + 2 * kept // 4
    assert found["flops"] == 2 * FACTS["least"]["multiply_adds"] / 4
    assert found["bound_ms"] == max(found["flops"] / 197e9, found["bytes"] / 819e6)
    assert built["parameters_split"] == 0.5
    text = table.text(built)
    assert "fsdp, which splits 50.0 %" in text and "perfect fusion: 0.25 GFLOP" in text

    training = FACTS | {"arguments": held | {"optimizer": 600_000}}
    found = roofline.build(training, "", V5E)["perfect_fusion"]
    # a quarter of the parameters is trained
    assert found["bytes"] == 300_000 * 5 / 4 + 2 * 600_000 + 10_000 + 2 * kept // 4
    assert "bound_ms" not in roofline.build(FACTS, "", topologies.parse("cpu:4"))["perfect_fusion"]
    assert "perfect_fusion" not in roofline.build(FACTS | {"least": None}, "", V5E)  # decoding


@pytest.mark.parametrize(
    ("flop", "said"),
    [(476.41e9, "476.4 GFLOP"), (2.5e12, "2,500.0 GFLOP"), (0.15e9, "0.15 GFLOP"),
     (0.05e9, "50.0 MFLOP"), (1.234e6, "1.2 MFLOP"), (480.0, "0.48 kFLOP"), (0, "0.0 GFLOP")],
)  # fmt: skip
def test_amounts_keep_two_digits(flop, said):
    assert table.amount(flop, "FLOP", ",.1f") == said


def test_heads_of_columns_are_whole(built):
    """A long name takes several lines of its column."""
    long = "configs/coatnet_digits.py:size=tiny parallel.mesh={'data': -1, 'fsdp': 4} model.x=a/b"
    text = table.beside([{**built, "config": "configs/x.py"}, {**built, "config": long}])
    head = text.partition("\nparameters")[0].splitlines()
    found = "".join(line[52:] for line in head)
    assert found.replace(" ", "") == long.replace(" ", "")
    assert {len(line.rstrip()) for line in head} <= set(range(83))


def test_memory_adds_up(built):
    found = built["memory"]
    parts = (*found["split"].values(), found["padding"], found["output"])
    assert sum(parts) + found["temporary"] + found["code"] == found["needed"]
    assert built["fits"]
    small = {**FACTS["memory"], "temporary": 2**34}
    assert roofline.memory({**FACTS, "memory": small}, V5E)["fits"] is False
    assert roofline.memory(FACTS, topologies.parse("cpu:8"))["fits"] is None


def test_text_says_what_is_not_known(built):
    text = table.text(built)
    assert roofline.NOT_VALIDATED in text and "fits: needs" in text and "reduce-scatter" in text
    assert roofline.NOT_VALIDATED in table.beside([built, built])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 43.37G "
            "of 15.75G hbm. Exceeded hbm capacity by 27.62G.",
            "needs 43.37 GiB of 15.75 GiB",
        ),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (198.51G) "
            "exceeds available HBM (15.75G).",
            "needs 198.51 GiB of 15.75 GiB",
        ),
        ("something new", "needs more than the 15.75 GiB"),
    ],
)
def test_out_of_memory_has_no_program(message, said):
    failed = {k: v for k, v in FACTS.items() if k != "memory"}
    failed["out_of_memory"] = out_of_memory(f"RESOURCE_EXHAUSTED: {message}")
    about = {"config": "x.py", "step": "train", "strategy": "replicate"}
    built = {**about, **roofline.build(failed, "", V5E)}
    assert f"DOES NOT FIT: {said}" in table.text(built)
    assert table.beside([built, built])


def test_an_attempt_that_did_not_fit_shows_what_is_large():
    text = gzip.decompress(GOLDEN.read_bytes()).decode()
    failed = {k: v for k, v in FACTS.items() if k != "memory"}
    failed["out_of_memory"] = out_of_memory("Used 43.37G of 15.75G hbm")
    built = roofline.build(failed, text, V5E)
    sizes = [row["bytes"] for row in built["arrays"]]
    assert sizes == sorted(sizes, reverse=True) and sizes
    assert built["collectives"] and built["lints"] and "step_ms" not in built
    about = {"config": "x.py", "step": "train", "strategy": "fsdp"}
    assert "largest arrays" in table.text({**about, **built})


@pytest.mark.parametrize(
    ("op_name", "layer", "way"),
    [
        (
            "jit(traced)/jvp(CoAtNet)/stage2/block13/norm/mul",
            "stage2/block*/norm",
            "forward",
        ),
        (
            "jit(traced)/transpose(jvp(CoAtNet))/stage2/block1/mlp/hidden/dot_general",
            "stage2/block*/mlp",
            "backward",
        ),
        (
            "jit(traced)/transpose(jvp(CoAtNet))/stage2/block1/(mlp/hidden/dot:attention/out/dot)",
            "stage2/block*/mlp",
            "backward",
        ),
        (
            "jit(f)/transpose(jvp(CoAtNet))/stage2/jvp(CoAtNet)/stage2/checkpoint/"
            "rematted_computation/block1.edged/block1/mlp/erfc",
            "stage2/block*/mlp",
            "recomputed",
        ),
        (
            "jit(f)/jvp(CoAtNet)/stage2/while/body/closed_call/block*/mlp/erfc",
            "stage2/block*/mlp",
            "forward",
        ),
        (
            "jit(f)/transpose(jvp(CoAtNet))/stage2/block1/branch_0_fun/expand/dot",
            "stage2/block*/expand",
            "backward",
        ),
        ("jit(f)/jvp(CoAtNet)/stem/add", "stem", "forward"),
        (
            "jit(f)/jvp(EncoderDecoder)/decoder.precompute_kv/layer2.precompute_kv/"
            "muse.precompute_kv/cross.precompute_kv/cond/branch_0_fun/dot_general",
            "decoder/layer*/muse",
            "forward",
        ),
        (
            "jit(f)/jit(search)/while/body/EncoderDecoder.step/decoder.step/layer1.step/dot",
            "decoder/layer*",
            "forward",
        ),
        ("jit(f)/jvp(CoAtNet)/stage2/jit(_threefry_split)/_scan/while", "stage2", "forward"),
        ("jit(f)/jvp(EncoderDecoder)/EncoderDecoder._logits/bld,vd->blv/dot", "(model)", "forward"),
        ("jit(f)/EncoderDecoder/EncoderDecoder._logits/bld,vd->blv/dot", "(model)", "forward"),
        ("", "(outside the model)", ""),
        ("jit(traced)/jvp()/rev", "(loss)", "forward"),
        ("jit(traced)/div", "(outside the model)", ""),
    ],
)
def test_layers_of_op_names(op_name, layer, way):
    assert roofline.layer_of(op_name, ["stem", "stage2", "decoder"]) == (layer, way)


def names(collectives, **facts):
    return [(x["level"], x["name"]) for x in lints.find({**FACTS, **facts}, collectives)]


def test_lint_global_batch():
    error = ("error", "global batch in a collective")
    assert names([sent("all-gather", (64, 1000))]) == [error]
    assert names([sent("all-gather", (64,))]) == []  # a bias
    assert names([sent("all-gather", (64, 1024))]) == []  # as large as a parameter
    assert names([sent("all-gather", (16, 64, 100))]) == []  # 16 of 64 rows: some other 64
    assert names([sent("all-gather", (64, 1000))], mesh={"data": 1, "model": 4}) == []
    # a micro-batch of all devices
    assert names([sent("all-gather", (16, 5000))], micro_batches=4) == [error]


def test_lint_much_and_small_and_types():
    assert names([sent(shape=(40_960,), count=10)]) == [("warning", "much is sent")]
    tiny = [sent(shape=(8,), key=str(n), op_name="a/norm/x") for n in range(10)]
    assert names(tiny) == [("notice", "many small all-reduces")]
    assert names(tiny[:9]) == []
    back = "jit(f)/transpose(jvp(M))/stage1/x"
    (found,) = lints.find(FACTS, [sent(shape=(65_536,), dtype="bf16", op_name=back)])
    assert "0.1 MB in bf16" in found["text"]


@pytest.mark.parametrize("limit", [0, 7, 8, 100, 137, 4096, 100_000])
@pytest.mark.parametrize("start", [8, 128, 1000])
def test_search_finds_the_largest_to_a_sixteenth(limit, start):
    tried = []

    def fits(n):
        assert n % 8 == 0 and n not in tried
        tried.append(n)
        return n <= limit

    found = search.largest(fits, start, unit=8)
    assert found <= limit and (found == 0) == (limit < 8)
    assert limit < found + max(8, found / 16) + 8 or limit < 8
    assert len(tried) < 24
