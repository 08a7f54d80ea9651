# SPDX-License-Identifier: Apache-2.0
import pytest

from localglobal_jax.parallel import chips


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v3", 61.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert chips.peak_flops(kind) == peak
