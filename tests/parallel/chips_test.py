# SPDX-License-Identifier: Apache-2.0
import pytest

from localglobal_jax.parallel import chips


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v3", 61.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert chips.peak_flops(kind) == peak
