# SPDX-License-Identifier: Apache-2.0
"""Wrong values in every field of a run: exit code 2, the name of the field, no traceback.

The long version, with models and data, is experiments/stress/bad_input.
"""

import json
import pathlib

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.cli.main import main
from localglobal_jax.config import loading, schema, validation

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
BASES = {
    "classification": f"{CONFIGS}/coatnet_digits.py:size=tiny,data=mock",
    "translation": f"{CONFIGS}/muse_lohelp.py:size=tiny,data=mock",
}
# No field of a run accepts any of these, except a text field, which keeps them as text.
NEVER = ("{1: 2}", "{[]: 1}", "1j", "b'x'", "...", "-1e400", "nan", "9" * 400, "(" * 300,
         "-" * 3000 + "1", "lambda: 1", "{1, 2}", "[" * 90 + "]" * 90)  # fmt: skip


def fields(section, prefix=""):
    for name, about in section.model_fields.items():
        kind = about.annotation
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        elif name not in ("model", "mesh"):
            yield f"{prefix}{name}", "str" in str(kind), kind


def run(kind, field, text):
    """Returns the checked run, or None and the error message."""
    try:
        return validation.check(loading.load(BASES[kind], {field: text})), ""
    except ValueError as error:
        return None, str(error)


FIELDS = [(k, *found) for k, kind in schema.RUNS.items() for found in fields(kind)]


@pytest.mark.parametrize("value", NEVER, ids=[v[:9] for v in NEVER])
def test_values_that_no_field_accepts(value):
    for kind, field, text, _ in FIELDS:
        found, said = run(kind, field, value)
        if text and found is not None:  # any text may be a name, a path or a split
            continue
        assert found is None, (field, value)
        assert field.rpartition(".")[2] in said and len(said) < 2000, (field, said)


@settings(deadline=None, max_examples=300)
@given(which=st.sampled_from(FIELDS), value=st.one_of(
    st.text(max_size=30), st.integers().map(str), st.floats().map(repr),
    st.lists(st.integers(-3, 3), max_size=3).map(lambda x: repr(tuple(x))),
    st.recursive(st.integers(), lambda x: st.lists(x, max_size=2)).map(repr),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2).map(repr)))  # fmt: skip
def test_any_text_is_a_value_or_an_error_that_names_the_field(which, value):
    kind, field, _, _ = which
    found, said = run(kind, field, value)
    if found is None:
        assert field.rpartition(".")[2] in said
    else:  # an accepted value comes back from config.json unchanged
        again = loading.from_saved(json.loads(loading.to_json(found)))
        assert again == found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.batch_size=2147483648"], "batch_size=2147483648"),
        (["--config.model.widths=(16, 100000)"], "config.model"),
        (["--config.data.image_size=(16384, 16384)"], "data.image_size=(16384, 16384)"),
        (["--config.model.depths=(1, 1000000)"], "depths=(1, 1000000)"),
        (["--config.model.classes=None"], "classes=None"),
        (["--config.init=/no/such/run"], "init=/no/such/run"),
        (["--config.data.dir=" + "x" * 3000, "--config.data.mock=False"], "data.dir"),
        (["--workdir="], "--workdir"),
        (["--workdir=" + "x" * 5000], "--workdir"),
        (["--config=" + "x" * 5000 + ".py"], "--config"),
        (["--config=/etc/hostname"], "--config /etc/hostname"),
    ],
)
def test_a_run_that_cannot_start_is_refused_before_anything_is_written(
    overrides, message, tmp_path, capsys
):
    command = ["train", f"--config={BASES['classification']}", f"--workdir={tmp_path}/run"]
    assert main([*command, *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


HEAD = "from ml_collections import ConfigDict\ndef get_config(arg=None):\n"


@pytest.mark.parametrize(
    "text",
    ["import sys; sys.exit(0)\n", "exit()\n", "x = 1\0", "def f(): f()\nf()\n", "1 / 0\n",
     HEAD + "    exit(3)\n", HEAD + "    return 5\n", HEAD + "    return ConfigDict()\n",
     HEAD + "    return ConfigDict(dict(model=dict(layout='C')))\n",
     HEAD + "    return ConfigDict(dict(model=dict(name=5)))\n",
     HEAD + "    return ConfigDict(dict(model=dict(name='coatnet'), steps=10**5000))\n"],
)  # fmt: skip
def test_a_config_file_that_raises_or_exits_is_an_error_of_the_command(text, tmp_path, capsys):
    (tmp_path / "c.py").write_text(text)
    assert main(["train", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/run"]) == 2
    assert "localglobal train: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
