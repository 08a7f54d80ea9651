# SPDX-License-Identifier: Apache-2.0
import pytest

from localglobal_jax.models import layout


def test_letters_repeat_patterns_repeat_and_strings_stand():
    stages = layout.parse(("C", "CT", "CTT"), (2, 4, 3), (8, 16, 32), (2, 2, 1))
    assert [s.letters for s in stages] == ["CC", "CTCT", "CTT"]
    assert [s.stride for s in stages] == [2, 2, 1]


def test_lengths_that_differ():
    with pytest.raises(ValueError, match=r'"CCTT".*4.*depths=\(2, 3\).*2'):
        layout.parse("CCTT", (2, 3), (8, 8, 8, 8))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("CX", (1, 1), (8, 8)), '"CX": "X"'),
        (("CT", (1, 1), (8,)), r"widths=\(8,\)"),
        (("CT", (1, 0), (8, 8)), r"depths=\(1, 0\)"),
        ((("C", "CT"), (1, 3), (8, 8)), '"CT".*depth 3'),
    ],
)
def test_wrong_layouts(args, message):
    with pytest.raises(ValueError, match=message):
        layout.parse(*args)


def test_drop_path_grows_linearly_over_all_blocks():
    stages = layout.parse("CT", (2, 3), (8, 8))
    assert layout.drop_path_rates(stages, 0.4) == [(0.0, 0.1), (0.2, pytest.approx(0.3), 0.4)]


def test_options_of_no_block():
    with pytest.raises(ValueError, match=r"T.*head_with"):
        layout.check_options({"T": {"head_with": 1}})
    with pytest.raises(ValueError, match='"Q"'):
        layout.check_options({"Q": {}})
