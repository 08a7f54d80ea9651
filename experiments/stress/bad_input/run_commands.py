# SPDX-License-Identifier: Apache-2.0
"""Wrong config files, arguments, workdirs and overrides, as commands:
exit code 2, no traceback, nothing left behind."""

import contextlib
import io
import pathlib
from collections.abc import Callable, Iterator

from run_fields import CONFIGS, VALUES, attempt

from localglobal_jax.cli import main

Trial = tuple[str, Callable[[], str]]
HEAD = "from ml_collections import ConfigDict\ndef get_config(arg=None):\n"
FILES = {
    "empty": "",
    "no get_config": "x = 1\n",
    "syntax error": "x = (\n",
    "tabs": "def f():\n\tx\n  y\n",
    "NUL": "x = 1\0\n",
    "latin1": "# gr\udcfc\udcdf\n",
    "mark": "\ufeffx = 1\n",
    "raises": "raise RuntimeError('x')\n",
    "recursion": "def f(): f()\nf()\n",
    "divides": "x = 1 / 0\n",
    "unknown import": "import nothing_like_it\n",
    "exits": "exit()\n",
    "exits with 0": "import sys; sys.exit(0)\n",
    "key": "{}['x']\n",
    "assertion": "assert False\n",
    "get_config is no function": "get_config = 5\n",
    "no argument": "def get_config():\n  return 1\n",
    "two arguments": "def get_config(a, b):\n  return 1\n",
    "binary": "\x7fELF\x01\n",
    "raises inside": HEAD + "    raise KeyError('x')\n",
    "exits inside": HEAD + "    exit(3)\n",
    "None": HEAD + "    return None\n",
    "a dict": HEAD + "    return {}\n",
    "5": HEAD + "    return 5\n",
    "a class": HEAD + "    return ConfigDict\n",
    "nothing in it": HEAD + "    return ConfigDict()\n",
    "model is text": HEAD + "    return ConfigDict(dict(model='coatnet'))\n",
    "model is None": HEAD + "    return ConfigDict(dict(model=None))\n",
    "model has no name": HEAD + "    return ConfigDict(dict(model=dict(layout='C')))\n",
    "model's name is 5": HEAD + "    return ConfigDict(dict(model=dict(name=5)))\n",
    "model's name is a list": HEAD + "    return ConfigDict(dict(model=dict(name=['x'])))\n",
    "task is 5": HEAD + "    return ConfigDict(dict(model=dict(name='coatnet'), task=5))\n",
    "data is a list": HEAD + "    return ConfigDict(dict(model=dict(name='coatnet'), data=[1]))\n",
    "a function": HEAD + "    return ConfigDict(dict(model=dict(name='coatnet'), steps=print))\n",
    "an object": HEAD + "    return ConfigDict(dict(model=dict(name='coatnet'), seed=object()))\n",
    "an array": HEAD
    + "    import numpy as np\n    return ConfigDict(dict(model=dict(name='coatnet'),"
    " data=dict(mean=np.ones(3))))\n",
    "10**5000": HEAD + "    return ConfigDict(dict(model=dict(name='coatnet'), steps=10**5000))\n",
    "keys are numbers": HEAD
    + "    return ConfigDict({'model': {'name': 'coatnet'}, 'data': {1: 2}})\n",
    "bytes": HEAD + "    return ConfigDict(dict(model=dict(name=b'coatnet')))\n",
    "a placeholder": HEAD + "    from ml_collections.config_dict import placeholder\n"
    "    return ConfigDict(dict(model=dict(name='coatnet'), steps=placeholder(int)))\n",
}
ARGUMENTS = (
    "size",
    "size=",
    "size=huge",
    "=tiny",
    "=",
    "size=tiny,size=",
    "sise=tiny",
    "x",
    "size==tiny",
    "size=tiny;x",
    "size=tiny:x",
    "$(x)",
    " ",
    "size=tiny,data",
    "data=none",
    "\0",
    "size=1",
)
NAMES = (
    "",
    ".",
    "..",
    "/",
    "/etc/passwd",
    "/dev/null",
    "/dev/zero",
    "no/such.py",
    "a\0b.py",
    "x" * 5000,
    "configs",
    "~/x.py",
    "gs://b/x.py",
    "http://x/y.py",
    "-",
    "a\nb.py",
    "\udcff.py",
)
WORKDIRS = (
    "FILE",
    "FILE/below",
    "a\0b",
    "x" * 5000,
    "",
    "ftp://x/y",
    "s3://x/y",
    "http://x/y",
    "/proc/x",
    "/dev/null",
    "/dev/null/x",
    "/sys/x",
)
DIGITS = f"{CONFIGS}/coatnet_digits.py"
MEANT = (  # field, value, on which base: what cannot work together
    ("batch_size", "0"),
    ("steps", "0"),
    ("eval.batch_size", "0"),
    ("data.image_size", "(7, 8)"),
    ("data.image_size", "(16384, 16384)"),
    ("data.image_size", "(1000000, 8)"),
    ("data.train_split", "trian"),
    ("data.train_split", "train[:0]"),
    ("data.eval_splits", "tset"),
    ("data.train_split", "train[5"),
    ("data.train_split", "train[200%:]"),
    ("model.depths", "(1,)"),
    ("model.layout", "CX"),
    ("model.layout", ""),
    ("model.layout", "C" * 10_000),
    ("model.widths", "(0, 0)"),
    ("model.widths", "(16, 100000)"),
    ("batch_size", "2147483648"),
    ("eval.batch_size", "1000000000"),
    ("data.name", "digit"),
    ("data.name", "fashion_mnist"),
    ("data.name", "huggingface:x"),
    ("data.dir", "gs:/x"),
    ("data.dir", "gs://bucket"),
    ("data.dir", "/dev/null"),
    ("data.dir", "/proc/x"),
    ("init", "/no/such/run"),
    ("checkpoint.best", "test/acuracy"),
    ("parallel.mesh", "{'data': 3}"),
    ("parallel.mesh", "{'data': 0}"),
    ("parallel.mesh", "{'x': -1, 'y': -1}"),
    ("optim.accumulate", "7"),
    ("log.profile", "(10, 20)"),
    ("data.pad", "1000000"),
    ("data.threads", "100000"),
    ("optim.warmup_steps", "100"),
)


def trials(scratch: pathlib.Path) -> Iterator[Trial]:
    """Yields (name, function) of every attempt."""
    dirty = scratch / "dirty"
    for name, text in FILES.items():

        def file(text=text):
            dirty.mkdir()
            (dirty / "c.py").write_bytes(text.encode("utf-8", "surrogateescape"))
            return command("train", f"--config={dirty}/c.py", f"--workdir={dirty}/run")

        yield f"config file: {name}", file
    for arg in ARGUMENTS:
        yield (
            f"argument: {arg!r}",
            lambda arg=arg: command("train", f"--config={DIGITS}:{arg}", f"--workdir={dirty}/run"),
        )
    for name in NAMES:
        yield (
            f"config: {name[:40]!r}",
            lambda name=name: command("train", f"--config={name}", f"--workdir={dirty}/run"),
        )
    for name in WORKDIRS:

        def workdir(name=name):
            dirty.mkdir()
            (dirty / "file").touch()
            given = name.replace("FILE", f"{dirty}/file")
            return command("train", f"--config={DIGITS}:size=tiny,data=mock", f"--workdir={given}")

        yield f"workdir: {name[:40]!r}", workdir
    for field, value in MEANT:
        shown = f"{field}={value[:40]}"
        base = f"{DIGITS}:size=tiny"
        yield f"together: {shown}", lambda f=field, v=value, b=base: refused(dirty / "run", b, f, v)
    for value in VALUES:
        words = ("sweep", f"--config={DIGITS}", f"--workdir={dirty}/run", "--dry_run")
        shown = value if len(value) < 40 else f"{value[:10]}... ({len(value)})"
        yield f"sweep: {shown!r}", lambda v=value, w=words: command(*w, f"--sweep={v}")
        yield f"prepare: {shown!r}", lambda v=value: command("prepare", v, f"--dir={dirty}/tfds")


def refused(workdir: pathlib.Path, base: str, field: str, value: str) -> str:
    kind = attempt(workdir, base, field, value)
    assert kind == "refused", "was taken"
    return kind


def command(*words: str) -> str:
    """Asserts exit code 2 and a message without a traceback."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(err):
        try:
            code = main.main(list(words))
        except SystemExit as stop:  # argparse, or a config that calls exit()
            code = stop.code
    said = err.getvalue()
    assert code == 2, f"exit code {code}: {said[-300:]}"
    assert "Traceback" not in said, said
    assert "localglobal" in said, f"says nothing: {said}"
    return "refused"
