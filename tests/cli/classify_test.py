# SPDX-License-Identifier: Apache-2.0
"""The command `localglobal classify`; its answers are tested in `tests/inference`."""

import pytest

from localglobal_jax.cli import classify


@pytest.mark.parametrize(
    "name", ["a" * 251 + ".jpg", "a." + "b" * 250, "a." + "\u00e9" * 120, "\u00e9" * 124 + ".webp"]
)
def test_a_picture_of_any_name_has_an_overlay(name, tmp_path):
    (tmp_path / name).touch()
    (tmp_path / classify._overlay_name(name)).touch()
    assert len(list(tmp_path.glob("*.png"))) == 1
