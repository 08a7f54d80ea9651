# SPDX-License-Identifier: Apache-2.0
"""The text of a small program that XLA compiled for two hosts of four H100, without a GPU.

A step of gradient descent, batch 64 over eight devices, bfloat16 but for the last product:
convolution 3x3, 64 -> 256 channels, on 16x16; five times ``gelu(x @ same)`` in a scan, 256 -> 256;
``x @ head`` in float32, 256 -> 128.
"""

import gzip
import pathlib
from collections import Counter

import pytest

from localglobal_jax.parallel.chips import GPUS
from localglobal_jax.profiling import collectives, gpu_kernels, hlo, lints, roofline, topologies

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/plan_h100.txt.gz"
POSITIONS = 64 * 16 * 16 // 8  # of one device
CONVOLUTION = 2 * POSITIONS * 3 * 3 * 64 * 256
SAME = 2 * POSITIONS * 256 * 256
HEAD = 2 * POSITIONS * 256 * 128


@pytest.fixture(scope="module")
def program():
    return hlo.Program(gzip.decompress(GOLDEN.read_bytes()).decode())


@pytest.fixture(scope="module")
def kernels(program):
    return gpu_kernels.kernels(program, GPUS["h100"])


def test_flop_of_library_calls_by_dtype_and_runs(kernels):
    work = Counter({(k.kind, k.dtype, k.flops): 0 for k in kernels if k.flops})
    for k in kernels:
        work[k.kind, k.dtype, k.flops] += k.runs if k.flops else 0
    assert +work == {
        ("convolution", "bf16", CONVOLUTION): 2,  # forward, gradient of the kernel
        ("product", "bf16", SAME): 3 * 5,
        ("product", "f32", HEAD): 3,
    }


def test_a_kernel_takes_its_roofline_and_more(kernels):
    for k in kernels:
        assert k.estimate > k.roofline >= k.nbytes / GPUS["h100"].hbm
        assert k.roofline >= k.flops / GPUS["h100"].flops


def test_the_workspace_of_a_library_is_no_traffic(kernels):
    (product,) = [k for k in kernels if k.name == "custom-call.5"]
    assert product.nbytes == 2 * (2 * POSITIONS * 256 + 256 * 256)


def test_copies_are_told_from_fusions(kernels):
    assert {k.name for k in kernels if k.kind == "copy"} == {
        "wrapped_transpose", "copy.51", "copy.10", "input_transpose_fusion",
    }  # fmt: skip
    assert {k.kind for k in kernels} == {"copy", "fusion", "product", "convolution"}


def test_rows_sum_to_the_step(kernels):
    rows = {row["kind"]: row for row in gpu_kernels.rows(kernels)}
    assert sum(row["count"] for row in rows.values()) == sum(k.runs for k in kernels)
    assert rows["product"]["flops"] == 15 * SAME + 3 * HEAD
    assert rows["convolution"]["flops"] == 2 * CONVOLUTION


def test_gradients_cross_the_network_once_per_host(program):
    sent = collectives.collectives(program)
    assert {c.devices for c in sent} == {tuple(range(8))}
    payload = sum(c.payload for c in sent)
    assert sum(c.network(4) for c in sent) == pytest.approx(2 * payload * (1 / 2) / 4)
    assert sum(c.network(8) for c in sent) == 0  # one host of eight


def test_lints(kernels):
    facts = {"mesh": {"data": 8}, "rows": 64, "items": 64, "micro_batches": 1}
    facts |= {"parameter_sizes": [], "parameter_bytes": 10**9}
    found = {lint["name"]: lint for lint in lints.find(facts, [], kernels)}
    assert found["float32 products"]["level"] == "warning"
    assert "head" in found["float32 products"]["text"]
    assert "many short kernels" not in found  # there are fewer than a hundred
    assert found["layouts of convolutions"]["level"] == "notice"  # only the kernel is transposed
    assert "copies and transposes" not in found


def test_lints_of_a_model_in_nchw():
    """Convolution 3x3 of bf16[8,64,32,32] in NCHW, 64 -> 128; 150 times a tanh of eight numbers."""
    text = gzip.decompress(GOLDEN.with_name("plan_h100_nchw.txt.gz").read_bytes()).decode()
    kernels = gpu_kernels.kernels(hlo.Program(text), GPUS["h100"])
    (convolution,) = [k for k in kernels if k.kind == "convolution"]
    assert convolution.layout == "NHWC"
    before, weights, after = 8 * 32 * 32 * 64, 64 * 128 * 9, 8 * 32 * 32 * 128
    around = sorted((k.nbytes for k in kernels if k.feeds_convolution), reverse=True)
    assert around == [2 * 2 * n for n in (after, before, weights)]  # read and written, bfloat16
    facts = {"mesh": {"data": 1}, "rows": 8, "items": 8, "micro_batches": 1}
    facts |= {"parameter_sizes": [], "parameter_bytes": 10**9}
    found = {lint["name"]: lint for lint in lints.find(facts, [], kernels)}
    assert found.keys() == {
        "layouts of convolutions",
        "copies and transposes",
        "many short kernels",
    }
    assert found["layouts of convolutions"]["level"] == "warning"
    assert "NHWC" in found["layouts of convolutions"]["text"]
    short = [k for k in kernels if k.roofline < lints.SHORT]
    assert str(sum(k.runs for k in short)) in found["many short kernels"]["text"]
    assert sum(k.runs for k in short) > 3 * 150


def test_report_of_a_gpu_has_links_and_kernels():
    facts = {
        "mesh": {"data": 8}, "batch": "64 images", "items": 64, "items_name": "images", "rows": 64,
        "micro_batches": 1, "parameters": 1, "parameter_bytes": 4, "parameter_sizes": [],
        "split_parameter_bytes": 0, "least": {"multiply_adds": 1, "kept": 8},
        "multiply_adds": 1, "model_multiply_adds": 1, "arguments": {}, "parts": ["conv", "head"],
        "compile_cpu_seconds": 1.0, "compile_peak_bytes": 1,
        "memory": dict(arguments=0, output=0, alias=0, temporary=10**10, code=0, peak=0),
    }  # fmt: skip
    text = gzip.decompress(GOLDEN.read_bytes()).decode()
    report = roofline.build(facts, text, topologies.parse("h100:2x4"))
    assert report["bounds_ms"].keys() == {"compute", "memory", "nvlink", "network"}
    assert report["fits"] and report["memory"]["usable"] == int(0.75 * 79.11 * 2**30)
    assert report["bounds_ms"]["network"] == pytest.approx(report["network_bytes"] / 50e9 * 1e3)
    estimated = sum(row["estimated_ms"] for row in report["kernels"])
    assert report["step_ms"]["high"] >= estimated > report["step_ms"]["low"]
    assert "estimated_cycles" not in report


# As XLA writes it for relative attention, backward: query, key, value, statistics, gradient, bias
# and output.
ATTENTION = """HloModule attention

ENTRY %main (q: bf16[8,50,6,32], k: bf16[8,190,6,32]) -> bf16[8,6,50,32] {
  %q = bf16[8,50,6,32]{3,2,1,0} parameter(0)
  %k = bf16[8,190,6,32]{3,2,1,0} parameter(1)
  %b = bf16[1,6,50,190]{3,2,1,0} parameter(2)
  %forward = (bf16[8,6,50,32]{3,1,2,0}, f32[8,6,50]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k, %b), custom_call_target="__cudnn$fmhaScaleBiasSoftmax"
  %y = bf16[8,6,50,32]{3,1,2,0} get-tuple-element(%forward), index=0
  %s = f32[8,6,50]{2,1,0} get-tuple-element(%forward), index=1
  %backward = (bf16[8,6,50,32]{3,1,2,0}, bf16[8,6,190,32]{3,1,2,0}, bf16[8,6,190,32]{3,1,2,0}, bf16[1,6,50,190]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k, %s, %y, %b, %y), custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"
  ROOT %dq = bf16[8,6,50,32]{3,1,2,0} get-tuple-element(%backward), index=0
}
"""  # noqa: E501


def test_attention_of_cudnn_has_two_products_forward_and_five_backward():
    found = gpu_kernels.kernels(hlo.Program(ATTENTION), GPUS["h100"])
    product = 2 * 8 * 6 * 50 * 190 * 32
    assert [(k.kind, k.dtype, k.flops) for k in found] == [
        ("attention", "bf16", 2 * product),
        ("attention", "bf16", 5 * product),
    ]
    query, key, bias, sums = (
        2 * 8 * 6 * 50 * 32,
        2 * 8 * 6 * 190 * 32,
        2 * 6 * 50 * 190,
        4 * 8 * 300,
    )
    assert found[0].nbytes == 2 * query + 2 * key + bias + sums
    assert found[1].nbytes == 4 * query + 4 * key + 2 * bias + sums
