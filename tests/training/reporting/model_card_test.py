# SPDX-License-Identifier: Apache-2.0
"""The card says what it was given, in tables that stay tables."""

import json
import re
import sys

import pytest

import localglobal_jax as lg
from localglobal_jax.training.reporting import model_card
from localglobal_jax.training.reporting import run as reporting
from localglobal_jax.training.tasks import classification, translation

GIVEN = {
    "name": "coatnet-digits",
    "summary": "A small CoAtNet.",
    "config": {"model": {"name": "coatnet", "layout": ["C", "T"]}},
    "data": {"name": "digits", "test examples": 360},
    "parameters": 1234567,
    "steps": 1000,
    "metrics": {"test": {"loss": 0.0512, "count": 360}, "train": {"loss": 0.01}},
    "use": 'module, variables = lg.load("path")',
    "versions": {"jax": "0.10.2"},
    "environment": {"devices": "2 x cpu | host\nname"},
}


def test_everything_given_is_in_it():
    card = model_card.model_card(**GIVEN, command="localglobal train", curve="curve.png")
    for text in ("# coatnet-digits\n", "1,234,567 parameters", "1,000 steps", "lg.load("):
        assert text in card
    assert "| split | loss | count |\n| --- | --- | --- |\n| test | 0.0512 | 360 |\n" in card
    assert "| train | 0.01 |  |" in card
    assert "![learning curve](curve.png)" in card
    assert "```sh\nlocalglobal train\n```" in card
    config = card.split("```json\n")[1].split("\n```")[0]
    assert json.loads(config) == GIVEN["config"]


def test_cells_cannot_break_the_table():
    assert "| devices | 2 x cpu \\| host name |" in model_card.model_card(**GIVEN)


def test_what_is_not_there_leaves_no_hole():
    card = model_card.model_card(**GIVEN | {"metrics": {}})
    assert "No evaluation was run." in card
    assert "learning curve" not in card and "How it was trained" not in card
    assert "\n\n\n" not in card


@pytest.mark.parametrize("task", [classification, translation])
def test_the_code_of_the_card_uses_public_names(task):
    names = set(re.findall(r"lg\.(\w+)", task.USE))
    assert names and names <= set(lg.__all__)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/bin/localglobal", "train", "--config=a b.py"], "localglobal train '--config=a b.py'"),
        (["/x/localglobal_jax/__main__.py", "train"], "localglobal train"),
        (
            ["/x/localglobal", "train", "--config=caf\udce9.py"],
            r"localglobal train '--config=caf\xe9.py'",
        ),
        (["/home/me/script.py", "--alpha", "3"], None),
        (["/x/ipykernel_launcher.py", "-f", "kernel.json"], None),
        ([""], None),
    ],
)
def test_the_command_of_a_card_is_one_of_ours(argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert reporting._command() == command


def test_small_numbers_and_large_counts_are_whole():
    assert model_card._show(2e-5) == "2e-05" and model_card._show(0.98765) == "0.9877"
    assert reporting.short(123_456) == "123456" and reporting.short(0.123456) == "0.12346"
