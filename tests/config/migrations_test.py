# SPDX-License-Identifier: Apache-2.0
"""Saved configs of earlier versions are read with the names of today."""

import json

import pytest

from localglobal_jax.config import loading, migrations, schema

FIRST = {
    "optim": {"warmup_from": 1e-7, "warmup_steps": 5},
    "parallel": {"formulation": "plain"},
}


def fields_of(section):
    annotation = schema.Run.model_fields[section].annotation
    return annotation.model_fields


def test_renamed_options_are_read():
    found = migrations.migrate(FIRST)
    assert found == {
        "optim": {"init_learning_rate": 1e-7, "warmup_steps": 5},
        "parallel": {"implementation": "reference"},
        "data": migrations.FORMER,
    }
    assert FIRST["optim"]["warmup_from"] == 1e-7  # the input is not changed


@pytest.mark.parametrize("renamed", [one for step in migrations.RENAMED for one in step])
def test_the_table_names_fields_of_the_schema(renamed):
    section, _, name = renamed.now.partition(".")
    assert name in fields_of(section)
    assert renamed.before.partition(".")[0] == section


def test_a_saved_config_says_its_schema(tmp_path):
    config = loading.load_config("configs/coatnet_digits.py:size=tiny,data=mock")
    run = loading.check(config)
    file = tmp_path / "config.json"
    file.write_text(loading.to_json(run))
    assert json.loads(file.read_text())["schema"] == migrations.SCHEMA
    assert loading.read_json(file) == run


@pytest.mark.parametrize("number", [migrations.SCHEMA + 1, -1, "1", None])
def test_a_later_schema_is_an_error_that_names_the_file(number, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"schema": number}))
    with pytest.raises(ValueError, match=str(file)):
        loading.read_json(file)
