# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from localglobal_jax.config import loading, schema, validation
from localglobal_jax.config import values as config_values
from localglobal_jax.launch import expand, search

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
BASE = {"model": {"name": "coatnet"}}


def test_parse_arg_gives_the_types_of_the_defaults():
    arg = loading.parse_arg("size=tiny,steps=100,lr=1,fast", size="b", steps=1, lr=0.1, fast=False)
    assert arg.to_dict() == {"size": "tiny", "steps": 100, "lr": 1.0, "fast": True}
    with pytest.raises(ValueError, match=r'"sise".*"size"'):
        loading.parse_arg("sise=tiny", size="b")
    with pytest.raises(ValueError, match="size=VALUE"):
        loading.parse_arg("size", size="b")
    assert loading.parse_arg("", size=("demo", "tiny")).size == "demo"
    assert loading.parse_arg("size=tiny", size=("demo", "tiny")).size == "tiny"
    with pytest.raises(ValueError, match=r'size.*"tin".*"tiny"'):
        loading.parse_arg("size=tin", size=("demo", "tiny"))


def test_a_path_in_the_argument_may_hold_commas():
    arg = loading.parse_arg("init=runs/a,b,size=tiny", init="", size=("demo", "tiny"))
    assert arg.to_dict() == {"init": "runs/a,b", "size": "tiny"}
    for text in ("size=tiny,b", "init=a,b", "b,init=runs/a", "init=runs/a,b=c"):
        with pytest.raises(ValueError, match='"b"'):
            loading.parse_arg(text, init="", size=("demo", "tiny"))


@pytest.mark.parametrize("name", ["coatnet_finetune", "finetune_folder"])
def test_fine_tuning_starts_from_a_path_with_commas(name, tmp_path):
    model = {"name": "coatnet", "layout": "CT", "depths": [1, 1], "classes": 7, "dtype": "float32"}
    file = tmp_path / "a,b" / "run,2" / "checkpoints/3/metadata/metadata"
    init, folder = file.parents[3], pathlib.Path(__file__).parents[2] / "configs"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"metadata": {"model": model}}))
    run = validation.check(loading.load(f"{folder / name}.py:init={init},size=tiny,data=mock"))
    assert run.init == str(init) and run.data.mock
    want = {"name": "coatnet", "layout": "CT", "depths": (1, 1), "drop_path": 0.1}
    assert run.model == want


def test_fine_tuning_starts_from_the_newest_step_also_in_a_bucket(bucket):
    """As numbers: 10 is newer than 9."""
    for step in (9, 10):
        folder = epath.Path(bucket) / "checkpoints" / str(step)
        model = {"name": "coatnet", "layout": "CT", "depths": [1, 1], "widths": [step, step]}
        (folder / "metadata/metadata").write_text(json.dumps({"metadata": {"model": model}}))
        (folder / "commit_success.txt").write_text("")
    file = pathlib.Path(__file__).parents[2] / "configs" / "coatnet_finetune.py"
    config = loading.load(f"{file}:init={bucket},size=tiny,data=mock")
    assert config["init"] == bucket and config["model"]["widths"] == (10, 10)
    with pytest.raises(ValueError, match=f"init={bucket}/x"):
        loading.load(f"{file}:init={bucket}/x,size=tiny,data=mock")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid_short_and_has_a_tiny_size(file):
    validation.check(loading.load(str(file)))
    tiny = validation.check(loading.load(f"{file}:size=tiny"))
    assert tiny.steps <= 100
    assert len(file.read_text().splitlines()) <= 90


TRANSLATION = {"model": {"name": "muse"}, "task": {"name": "translation"}}


def test_the_task_chooses_the_class_of_the_data():
    run = validation.check({**TRANSLATION, "data": {"vocab": 500}})
    assert isinstance(run, schema.TranslationRun) and isinstance(run.data, schema.Text)
    assert isinstance(validation.check(BASE), schema.ClassificationRun)
    assert loading.from_saved(json.loads(loading.to_json(run))) == run
    files = validation.check({**TRANSLATION, "data": {"files": ["a.de", "a.en"]}})
    assert files.data.files == ("a.de", "a.en") and files.data.name == "text_pairs"
    assert loading.from_saved(json.loads(loading.to_json(files))) == files


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"vocabs": 3}, r'config\.data\.vocabs.*"vocab"'),
        ("data", {"vocab": 3}, r"config\.data\.vocab=3 .*8"),
        ("data", {"flip": True}, r"config\.data\.flip"),
        ("data", {"tokenizer": "word"}, r"config.data.tokenizer='word'.*'unigram'"),
        ("data", {"tokenizer": "dict"}, r'config\.data: tokenizer="dict".*dicts='),
        ("data", {"dicts": ["a"]}, "config.data: tokenizer="),
        ("data", {"files": ["a", "b", "c"]}, r"config\.data\.files=.*2"),
        ("task", {"name": "translation", "mixup": 1.0}, r"config\.task\.mixup"),
        ("task", {"name": "translate"}, r"config\.task\.name='translate'.*\"translation\""),
        ("task", {"name": None}, r"config\.task\.name=None.*classification, translation"),
        ("task", 3, r"config.task=3 \(int\)"),
    ],
)
def test_errors_inside_the_chosen_task(section, values, message):
    with pytest.raises(ValueError, match=message):
        validation.check({**TRANSLATION, section: values})


def test_overrides_use_the_schema_of_the_task():
    config = ConfigDict(TRANSLATION)
    loading.override(config, "data.files", "a.de,a.en")
    loading.override(config, "data.max_length", "1e2")
    run = validation.check(config)
    assert run.data.files == ("a.de", "a.en") and run.data.max_length == 100
    with pytest.raises(ValueError, match=r'"max_lenght".*"max_length"'):
        loading.override(config, "data.max_lenght", "1")
    with pytest.raises(ValueError, match=r'data.*"flip"'):
        loading.override(config, "data.flip", "true")


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("steps", "1e3", 1000),
        ("optim.learning_rate", "3e-4", 3e-4),
        ("optim.learning_rate", "1", 1.0),
        ("data.flip", "true", True),
        ("data.eval_splits", "test,train[:10%]", ("test", "train[:10%]")),
        ("data.image_size", "(16, 24)", (16, 24)),
        ("data.image_size", "16", (16, 16)),
        ("data.dir", "/data", "/data"),
        ("data.dir", "2024", "2024"),
        ("data.dir", "None", None),
        ("log.profile", "(10, 5)", (10, 5)),
        ("parallel.mesh", '{"data": 2}', {"data": 2}),
        ("checkpoint.best", "None", None),
    ],
)
def test_override(field, text, value):
    config = ConfigDict(BASE)
    loading.override(config, field, text)
    run = validation.check(config)
    for name in field.split("."):
        run = getattr(run, name)
    assert run == value
    assert type(run) is type(value)


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        *[("1", ("1",)), ("2026,7", ("2026", "7")), ("2026,a", ("2026", "a")), ("0.5", ("0.5",))],
        *[("1.10", ("1.10",)), ("1e3,0x10", ("1e3", "0x10")), ("True", ("True",))],
        *[("('1.10', 'a')", ("1.10", "a")), ("", ())],
    ],
)
def test_tags_may_be_numbers(text, tags):
    config = loading.load("configs/coatnet_digits.py", {"log.tags": text})
    assert validation.check(config).log.tags == tags


def test_override_reaches_into_the_model():
    config = ConfigDict({"model": {"name": "coatnet", "depths": (2, 2), "blocks": {"T": {}}}})
    loading.override(config, "model.depths", "(3, 4)")
    loading.override(config, "model.blocks.T.head_width", "16")
    loading.override(config, "model.layout", "CT")
    assert validation.check(config).model["layout"] == "CT"
    for text, layout in (("('C', 'CT')", ("C", "CT")), ("CT", "CT"), ("('C', 'CT')", ("C", "CT"))):
        loading.override(config, "model.layout", text)
        assert validation.check(config).model["layout"] == layout
    loading.override(config, "log.note", "(1, 2)")
    assert validation.check(config).log.note == "(1, 2)"
    model = validation.check(config).model
    assert model["depths"] == (3, 4) and model["layout"] == ("C", "CT")
    assert model["blocks"]["T"]["head_width"] == 16


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("optim.lerning_rate", "1", r'lerning_rate".*"learning_rate"'),
        ("optm.learning_rate", "1", r'"optm".*"optim"'),
        ("stepz", "1", r'"stepz".*"steps"'),
        ("optim", "1", r"config\.optim\.KEY"),
        ("steps.x", "1", r"config\.steps\.x"),
        ("data.flip", "maybe", r"config\.data\.flip='maybe'"),
    ],
)
def test_override_refuses(field, text, message):
    config = ConfigDict({**BASE, "steps": 10})
    with pytest.raises(ValueError, match=message):
        loading.override(config, field, text)
        validation.check(config)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"steps": "ten"}, r"config.steps='ten' \(str\)"),
        ({"steps": -1}, r"config.steps=-1 .*0"),
        ({"steps": True}, r"config.steps=True \(bool\)"),
        ({"optim": {"learning_rate": float("nan")}}, r"config.optim.learning_rate=nan"),
        ({"optim": {"name": "adam"}}, r"config.optim.name='adam'.*'adamw'"),
        ({"optim": {"warmup": 3}}, r'config.optim.warmup: .*"warmup_steps"'),
        ({"dtype": "float16"}, "bfloat16"),
        ({"model": None}, "config.model=None"),
        ({"data": {"eval_crop": 5.0}}, r"config.data.eval_crop=5.0 .*squash"),
        ({"data": {"mean": (1e39,)}}, "config.data.mean=1e[+]39: the largest"),
        ({"data": {"area": (0.5,)}}, r"config.data.area=\(0.5,\): 1 values are too few"),
        ({"parallel": {"strategy": "fsdp"}}, r'config.parallel: .*"fsdp" in parallel.mesh'),
        ({"parallel": {"compile": "pmap", "mesh": {"data": 1, "model": 2}}}, "compile=pmap"),
        ({"parallel": {"batch_norm": "per_device"}}, "compile=pmap"),
        ({"task": {"name": "clasification"}}, "config.task.name"),
    ],
)
def test_check_names_the_field(tree, message):
    with pytest.raises(ValueError, match=message):
        validation.check({**BASE, **tree})


def test_check_lists_every_problem_at_once():
    with pytest.raises(ValueError, match=r"config.steps(.|\n)*config.data.pad"):
        validation.check({**BASE, "steps": 0, "data": {"pad": -1}})


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FIELDS = [
    (base, field)
    for base in (BASE, TRANSLATION)
    for field in config_values.flatten(validation.check(base).model_dump())
    if not field.startswith("model")
]


@given(base_field=st.sampled_from(FIELDS), value=JUNK)
def test_junk_in_any_field_is_a_value_error_that_names_it(base_field, value):
    base, field = base_field
    tree = validation.check(base).model_dump(mode="json")
    *parents, leaf = field.split(".")
    section = tree
    for name in parents:
        section = section[name]
    section[leaf] = value
    try:
        validation.check(tree)
    except ValueError as error:
        section = f"config.{'.'.join(parents)}: "  # of fields that do not fit each other
        assert f"config.{field}" in str(error) or (section in str(error) and leaf in str(error))


@pytest.mark.parametrize("name", [f.name for f in CONFIGS])
def test_json_roundtrip(name, tmp_path_factory):
    run = validation.check(loading.load(str(CONFIGS[0].with_name(name))))
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(loading.to_json(run))
    assert loading.read_json(file) == run
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        loading.read_json(file)


def test_difference():
    a, b = {"x": {"y": 1, "z": [1, 2]}}, {"x": {"y": 2, "z": (1, 2)}, "w": 0}
    assert config_values.difference(a, b) == {"w": ("(not set)", 0), "x.y": (1, 2)}


def test_missing_config_file_suggests_one():
    with pytest.raises(ValueError, match=r'digit\.py".*"[^"]*coatnet_digits\.py"'):
        loading.load(str(CONFIGS[0].with_name("coatnet_digit.py")))


def test_configs_load_without_jax():
    code = (
        "import sys; from localglobal_jax.config import loading, validation; "
        f"validation.check(loading.load({str(CONFIGS[0])!r})); "
        "assert not {'jax', 'tensorflow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_may_change_names_real_fields():
    text = {**BASE, "task": {"name": "translation"}}
    flat = [
        name
        for tree in (BASE, text)
        for name in config_values.flatten(validation.check(tree).model_dump())
    ]
    for free in schema.MAY_CHANGE:
        assert any(f == free or f.startswith(f"{free}.") for f in flat)


@pytest.mark.parametrize(("former", "now"), [("tuned", "fused"), ("plain", "reference")])
def test_the_former_name_of_implementation_still_loads(former, now, tmp_path):
    assert validation.check(BASE).parallel.implementation == "fused"
    tree = {**BASE, "parallel": {"formulation": former}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = validation.check(tree)
    assert run.parallel.implementation == now
    assert [w.category for w in caught] == [DeprecationWarning] * (former == "plain")
    (tmp_path / "config.json").write_text(loading.to_json(run))
    assert "formulation" not in (tmp_path / "config.json").read_text()
    assert loading.read_json(tmp_path / "config.json") == run


# ---------------------------------------------------------------------------- configs of one's own

OWN = """
from ml_collections import ConfigDict, FrozenConfigDict
def get_config(arg=None):
    c = ConfigDict()
    c.steps = 7
    c.model = dict(name="coatnet", blocks=dict(A=dict(kernel=3)))
    c.optim = dict(learning_rate=1, warmup_steps=c.get_oneway_ref("steps"))
    {end}
"""


def own(tmp_path, text, **files):
    for name, content in files.items():
        (tmp_path / f"{name}.py").write_text(content)
    file = tmp_path / "mine.py"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    "end",
    [
        "return c.lock()",
        "c.lock(); return c",
        "return FrozenConfigDict(c)",
        "c.optim = FrozenConfigDict(c.optim); return c",
        "return c.to_dict()",
    ],
)
def test_locked_and_frozen_configs_take_overrides(end, tmp_path):
    """yacs#21, omegaconf#1208: a KeyError or an AttributeError before."""
    spec = own(tmp_path, OWN.format(end=end))
    overrides = {"steps": "9", "optim.learning_rate": "3e-4", "model.depths": "(1, 2)"}
    overrides |= {"model.blocks.A.kernel": "5", "eval.every": "2", "data.mock": "true"}
    config = loading.load(spec, overrides)
    run = validation.check(config)
    assert (run.steps, run.optim.learning_rate, run.eval.every) == (9, 3e-4, 2)
    assert run.model == {"name": "coatnet", "depths": (1, 2), "blocks": {"A": {"kernel": 5}}}
    config.log = {"every": 3}
    assert validation.check(config).log.every == 3
    assert validation.check(loading.load_config(spec, steps=8)).steps == 8


def test_references_between_fields_survive(tmp_path):
    spec = own(tmp_path, OWN.format(end="return c.lock()"))
    assert loading.load(spec, {"steps": "9"}).optim.warmup_steps == 9


def test_dataclasses_of_a_config(tmp_path):
    """detectron2#639: with postponed annotations, a dataclass could not even be defined."""
    text = """
from __future__ import annotations
import dataclasses, typing
@dataclasses.dataclass
class Optim:
    learning_rate: float = 1e-3
    clip: dataclasses.InitVar[int | None] = None
@dataclasses.dataclass
class Run:
    model: dict[str, typing.Any]
    optim: Optim
    steps: int = 7
def get_config(arg=None):
    typing.get_type_hints(Run)
    return Run({"name": "coatnet"}, Optim())
"""
    run = validation.check(loading.load(own(tmp_path, text), {"optim.learning_rate": "2e-3"}))
    assert (run.steps, run.optim.learning_rate) == (7, 2e-3)


def test_modules_beside_a_config_are_imported(tmp_path):
    """As Python imports them beside a script; in each folder its own."""
    text = "import base\ndef get_config(arg=None):\n    import late\n    return base.make(late.N)\n"
    base = "from ml_collections import ConfigDict\ndef make(n):\n    return ConfigDict({'steps': n"
    before = list(sys.path)
    for name, steps in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        spec = own(tmp_path / name, text, base=base + "})\n", late=f"N = {steps}\n")
        assert loading.load(spec).steps == steps
    assert sys.path == before and not {"base", "late"} & sys.modules.keys()


def test_neighbours_of_a_config_are_the_same_in_all_its_functions(tmp_path):
    """Their types are compared, as by `isinstance`."""
    text = (
        "import itertools, spaces.inner\nfrom common import Size\nSIZE = Size()\n"
        "def get_config(arg=None):\n    import common\n    assert isinstance(SIZE, common.Size)\n"
        "    return {'model': {'name': 'coatnet'}}\n"
        "def sweep():\n    import common\n    assert isinstance(SIZE, common.Size)\n    yield {}\n"
        "def search():\n    import common\n    assert isinstance(SIZE, common.Size)\n"
        "    from localglobal_jax.config.sweeps import uniform\n"
        "    return {'optim.learning_rate': uniform(1e-4, 1e-3)}\n"
    )
    (tmp_path / "spaces").mkdir()  # a package without __init__.py
    (tmp_path / "spaces" / "inner.py").touch()
    spec = own(tmp_path, text, common="class Size: pass\n")
    assert len(expand.expand(spec, str(tmp_path / "runs")).runs) == 1
    assert search.read_space(spec, str(tmp_path / "runs"), "sweep", {}).fields
    assert not {"common", "spaces", "spaces.inner"} & sys.modules.keys()


def test_packages_deep_below_a_config_are_imported_once(tmp_path, monkeypatch):
    """As those of a virtual environment are: numpy cannot be imported twice."""
    packages = tmp_path / ".venv" / "lib" / "site-packages"
    (packages / "heavy").mkdir(parents=True)
    (packages / "heavy" / "__init__.py").write_text("import heavy.part\n")
    (packages / "heavy" / "part.py").write_text("")
    monkeypatch.syspath_prepend(packages)
    spec = own(tmp_path, "import heavy\n" + OWN.format(end="return c"))
    try:
        loading.load(spec)
        first = sys.modules["heavy"]
        loading.load(spec)
        assert sys.modules["heavy"] is first and "heavy.part" in sys.modules
    finally:
        for name in ("heavy", "heavy.part"):
            sys.modules.pop(name, None)


def test_a_config_may_be_the_first_to_import_jax_and_opencv(tmp_path):
    """Parts of their extensions have no file and no path; an import that is forbidden is None."""
    text = (
        "def get_config(arg=None):\n    import sys, jax, cv2, late\n    sys.modules['no'] = None\n"
        "    return {'model': {'name': 'coatnet'}}\n"
    )
    spec = own(tmp_path, text, late="")
    code = f"from localglobal_jax.config import loading; loading.load({spec!r}); import jax.numpy"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_paths_and_mappings_of_python_are_values(tmp_path):
    spec = pathlib.Path(
        own(tmp_path, OWN.format(end="c.parallel = dict(mesh=dict(data=2, fsdp=1))\n    return c"))
    )
    changes = {"parallel": {"mesh": {"data": -1}}, "data": {"class_weights": {"3": 2.0}}}
    config = loading.load_config(
        spec, init=tmp_path, model={"blocks": {"A": {"dim": 4}}}, **changes
    )
    run = validation.check({**config, "optim": ConfigDict({"b1": 0.5})})
    assert run.init == str(tmp_path) and run.optim.b1 == 0.5
    assert run.parallel.mesh == {"data": -1} and run.data.class_weights == {"3": 2.0}
    assert run.model["blocks"] == {"A": {"kernel": 3, "dim": 4}}  # every mapping is a section there
    with pytest.raises(ValueError, match=r"lg.load_config"):
        validation.check("configs/coatnet_digits.py")


@pytest.mark.parametrize(
    ("given", "noticed"),
    [
        ({"optim.momentum": "0.5"}, "optim.momentum"),
        ({"optim.momentum": "0.5", "optim.name": "sgd"}, ""),
        ({"optim.b1": "0.5", "optim.name": "sgd"}, "optim.b1"),
        ({"optim.schedule": "constant", "optim.end_learning_rate": "1e-5"}, "end_learning_rate"),
        ({"optim.warmup_steps": "0", "optim.init_learning_rate": "1e-5"}, "init_learning_rate"),
        ({"data.area": "(0.5, 1)", "data.crop": "pad"}, "data.area"),
        ({"data.pad": "2", "data.crop": "none"}, "data.pad"),
        ({"data.randaugment_magnitude": "20"}, "randaugment_magnitude"),
        ({"data.randaugment_magnitude": "20", "data.randaugment_layers": "2"}, ""),
        ({"model.name": "coatnet_0"}, "model.layout"),
        ({"data.layout": "splits"}, "data.layout"),
        ({"data.layout": "splits", "data.name": "folder"}, ""),
        ({"task.name": "translation", "task.beam": "0", "task.length_penalty": "2"}, ""),
        ({"task.name": "translation", "data.files": "a.tsv", "data.name": "opus"}, "data.name"),
        (
            {
                "task.name": "translation",
                "data.tokenizer": "dict",
                "data.dicts": "d.txt",
                "data.vocab": "99",
            },
            "data.vocab",
        ),
        ({"task.name": "translation", "task.beam": "0", "task.bleu_tokenizer": "intl"}, "bleu"),
    ],
    ids=str,
)
def test_an_override_that_is_not_read_is_noticed(given, noticed):
    text = "task.name" in given
    spec = "configs/muse_iwslt14.py" if text else "configs/coatnet_digits.py"
    found = validation.notices(validation.check(loading.load(spec, given)), given)
    assert len(found) == bool(noticed) and noticed in "".join(found)


@pytest.mark.parametrize(
    ("mesh", "given"),
    [
        ("c.parallel = dict(mesh=dict(data=2))", {"parallel.mesh": "{'data': 1, 'model': 2}"}),
        ("c.parallel = dict(mesh=ConfigDict(dict(data=2)))",
         {"parallel.mesh": '{"data": 1, "model": 2}'}),
        ("c.parallel = dict(mesh=dict(data=1))", {"parallel.mesh.model": "2"}),
        ("", {"parallel.mesh.data": "1", "parallel.mesh.model": "2"}),
        ("", {"parallel.mesh": "{'data': 1, 'model': 2}"}),
    ],
)  # fmt: skip
def test_a_dict_is_overridden_whole(mesh, given, tmp_path):
    spec = own(tmp_path, OWN.format(end=f"{mesh}\n    return c"))
    assert validation.check(loading.load(spec, given)).parallel.mesh == {"data": 1, "model": 2}
    blocks = {"model.blocks": "{'A': {'heads': 2}}"}
    assert loading.load(spec, blocks).model.blocks.to_dict() == {"A": {"heads": 2}}
    for field in ("model.blocks", "optim"):
        with pytest.raises(ValueError, match=rf"config\.{field} is a section"):
            loading.load(spec, {field: "3"})


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("eval.batch_size", "1e4", 10_000),
        ("optim.learning_rate", "3e-4", 3e-4),  # the file has the integer 1
        ("optim.warmup_steps", "1e1", 10),
        ("data.in_memory", "yes", True),
        ("data.mean", "0.5", (0.5,)),  # the file has a list
        ("log.profile", "1,2", (1, 2)),
        ("log.profile", "None", None),
        ("data.dir", "~/x", str(pathlib.Path.home() / "x")),
        ("init", "~/x", str(pathlib.Path.home() / "x")),
    ],
)
def test_overrides_have_the_type_of_the_annotation(field, text, value, tmp_path):
    spec = own(tmp_path, OWN.format(end="c.data = dict(mean=[1, 2])\n    return c"))
    run = validation.check(loading.load(spec, {field: text}))
    found = config_values.flatten(run.model_dump())[field]
    assert found == value and type(found) is type(value)


def test_placeholders_take_values_and_required_ones_are_named(tmp_path):
    end = "c.steps = config_dict.required_placeholder(int)\n    c.optim = dict(b1=config_dict."
    end += "placeholder(float), eps=config_dict.required_placeholder(float))\n    return c"
    spec = own(tmp_path, "from ml_collections import config_dict\n" + OWN.format(end=end))
    run = validation.check(
        loading.load(spec, {"steps": "1e1", "optim.b1": "0.5", "optim.eps": "1e-3"})
    )
    assert (run.steps, run.optim.b1, run.optim.eps) == (10, 0.5, 1e-3)
    with pytest.raises(ValueError, match=r"--config\.optim\.eps=.*--config\.steps="):
        validation.check(loading.load(spec))


def test_a_config_that_changed_within_a_second_is_read_again(tmp_path, monkeypatch):
    """Python's bytecode is that of the time in seconds and the size of a file."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "same_size.py"
    for number in (1, 2):
        file.write_text(f"NUMBER = {number}\n")
        os.utime(file, (1e9, 1e9))
        assert number == loading.import_file(file).NUMBER
    assert [path.name for path in tmp_path.iterdir()] == ["same_size.py"]


def test_a_section_of_one_key_keeps_the_other_defaults():
    config = loading.load("configs/coatnet_digits.py", {"parallel.mesh.model": "2"})
    assert validation.check(config).parallel.mesh == {"data": -1, "model": 2}


@pytest.mark.parametrize("arg", ["steps=abc", "steps=1.5", "rate=x"])
def test_an_argument_has_the_type_of_its_default(arg):
    with pytest.raises(ValueError, match=f"config argument {arg}"):
        loading.parse_arg(arg, steps=10, rate=0.5)
    found = loading.parse_arg("steps=1e3,rate=1,init=None", steps=10, rate=0.5, init="x")
    assert (found.steps, found.rate, found.init) == (1000, 1.0, None)
    assert loading.parse_arg("steps=None,size=auto", steps=10, size=(0, "auto")).size == "auto"
    assert loading.parse_arg("sides=[64]", sides=[32]).sides == (64,)


def test_values_of_numpy_and_sections_inside_dicts():
    size = (np.int64(8), np.int64(8))
    tree = {
        "model": {"name": "coatnet", "blocks": ConfigDict({"T": {"head_width": np.int32(8)}})},
        "data": {"image_size": size},
    }
    run = validation.check(tree)
    assert run.data.image_size == (8, 8) and run.model["blocks"] == {"T": {"head_width": 8}}
    loading.to_json(run)
