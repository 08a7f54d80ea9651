# SPDX-License-Identifier: Apache-2.0
"""Small real trainings for the harnesses beside this file, and the commands that start them.

Everything that can differ after a bad restart is on: moving average, BatchNorm, dropout, drop
path, augmentation, windows of metrics that end between checkpoints, the best step kept.
"""

import os
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
OBSERVED = HERE / "observed.py"

TINY_TEXT = {
    "data.train_split": "train[:2000]",  # real sentences; fewer, so that a start takes seconds
    "data.max_length": "24",
    "optim.ema": "0.9",
}
RUNS = {
    "images": (
        "coatnet_digits.py:size=tiny",
        {"data.flip": "true", "task.label_smoothing": "0.1", "model.drop_path": "0.2"},
    ),
    "text": (
        "muse_lohelp.py:size=tiny",
        {
            **TINY_TEXT,
            "data.eval_splits": "validation[:4]",
            "checkpoint.best": "-validation[:4]/loss",
            "task.beam": "2",
        },
    ),
}
DATA = {  # a data set's name and its folder
    "images": ("digits", "digits/1.0.0"),
    "text": ("lohelp_translate/en-de", "lohelp_translate/en-de/1.0.0"),
}
# Both saving and evaluating are off the windows of the log, so that windows are cut in two.
KILLED = {
    "steps": "60",
    "log.every": "2",
    "log.tensorboard": "false",
    "checkpoint.every": "3",
    "eval.every": "12",
}


def arguments(kind, workdir, **overrides):
    """``train --config ...`` of one of `RUNS`."""
    config, own = RUNS[kind]
    options = {**own, **overrides}
    return [
        *("train", "--json", f"--config={ROOT / 'configs' / config}", f"--workdir={workdir}"),
        *(f"--config.{field}={value}" for field, value in options.items()),
    ]


def environment(fast_compile=False, data_dir=None):
    """Returns the environment of the child: on the CPU, with this source tree."""
    found = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    if data_dir:  # not data.dir: the config is compared too
        found["TFDS_DATA_DIR"] = str(data_dir)
    if fast_compile:  # most of a short life is compiling; the large pages cost an exec
        found["GLIBC_TUNABLES"] = found.get("GLIBC_TUNABLES", "")
        found["XLA_FLAGS"] = (
            "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        )
    return found


def command(arguments):
    """Returns the command of a training."""
    return [sys.executable, "-m", "localglobal_jax", *arguments]


def without_paths(text):
    """`text` with file names in place of whole paths: results do not name the machine's folders."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)
