# SPDX-License-Identifier: Apache-2.0
"""Compares the files of a killed run with those of an undisturbed one; lists every difference."""

import json
import pathlib

import jax
import numpy as np
import runs

from localglobal_jax.checkpoints import reader
from localglobal_jax.training.reporting.run import OF_THE_MACHINE

TIMES = {"images_per_second", "tokens_per_second", "steps_per_second", *OF_THE_MACHINE}


def metrics(workdir):
    """Returns the lines without times. Raises on an incomplete line."""
    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n"), "metrics.jsonl ends in the middle of a line"
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def batches(file):
    """``[(step, checksum)]`` as the loop saw them, repeats included."""
    return [(int(step), crc) for step, crc in map(str.split, file.read_text().splitlines())]


def kept(run, regular, stopped, scores):
    """The steps that must be there at the end.

    Args:
      run: the options ``keep`` and ``best`` (-1: smaller is better), as `schema.Checkpoints` has.
      regular, stopped: steps saved on schedule; steps saved because a SIGTERM came.
      scores: step -> its metric, of those that were evaluated when they were saved.
    """
    newest = sorted({*regular, *stopped})[-run["keep"] :]
    return sorted({*newest, max(scores, key=lambda step: (run["sign"] * scores[step], step))})


def arrays(workdir, step):
    """Path -> array of one checkpoint, digests checked; and its metadata."""
    _, tree, metadata = reader.read(workdir, step)
    del metadata["metrics_crc32"]  # of lines with times in them
    del metadata["environment"]  # somebody may commit between two runs
    del metadata["config"]["parallel"]["compilation_cache"]  # off where compiling was to be killed
    return reader.flatten(tree)[0], metadata


def differences(reference, workdir, *, steps, wanted_steps, seen=True):
    """Returns a list of differences as text, empty if there are none.

    Args:
      steps: of the whole run.
      wanted_steps: the checkpoints that must be left; those the reference has too are compared.
      seen: the batches were written down, too (`observed.py`).
    """
    found = []
    ours, theirs = metrics(workdir), metrics(reference)
    keys = [(line["step"], line["split"]) for line in ours]
    if len(set(keys)) < len(keys):
        found.append(f"metrics.jsonl has {sorted({k for k in keys if keys.count(k) > 1})} twice")
    if ours != theirs:
        other = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), None)
        found.append(f"metrics.jsonl: {len(ours)} lines for {len(theirs)}; first: {other}")

    there = [entry["step"] for entry in reader.inspect(workdir)["steps"]]
    left = [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]
    if there != wanted_steps or left:
        found.append(f"checkpoints {there} and {left}, expected {wanted_steps}")
    for step in set(there) & {entry["step"] for entry in reader.inspect(reference)["steps"]}:
        (ours, about), (theirs, theirs_about) = arrays(workdir, step), arrays(reference, step)
        if ours.keys() != theirs.keys():
            found.append(f"step {step}: other leaves: {sorted(ours.keys() ^ theirs.keys())}")
        for path in ours.keys() & theirs.keys():
            x, y = np.asarray(ours[path]), np.asarray(theirs[path])
            if (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
                found.append(f"step {step}: {path} has other bits")
        if about != theirs_about:
            found.append(f"step {step}: other metadata")
    if steps not in there:
        found.append(f"the last step, {steps}, is not there")

    if seen:
        found += batches_differ(reference, workdir, steps)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (reference, workdir)]
    for config in configs:
        del config["parallel"]["compilation_cache"]
    if configs[0] != configs[1]:
        found.append("config.json is another")
    found += files_differ(reference, workdir, ["tokenizer"])
    return found


def batches_differ(reference, workdir, steps):
    """Returns differences of the batches that both runs were given."""
    seen = batches(workdir / "batches.txt")
    expected, found = dict(batches(reference / "batches.txt")), []
    if missing := set(range(steps)) - {step for step, _ in seen}:
        found.append(f"no batch was made for the steps {sorted(missing)}")
    if wrong := sorted({step for step, checksum in seen if expected[step] != checksum}):
        found.append(f"other batches than the undisturbed run at the steps {wrong}")
    return found


def data_differs(kind, a, b):
    """Returns differences of two prepared data sets: files, their records and the order of these.

    Not the bytes of a record: Protocol Buffers write the entries of a map in an order that is
    different in every process.
    """
    import tensorflow_datasets as tfds  # noqa: PLC0415, a second

    from localglobal_jax.data.tfds.records import Records  # noqa: PLC0415

    folders = [pathlib.Path(root, runs.DATA[kind][1]) for root in (a, b)]
    listed = [sorted(p.name for p in folder.parent.rglob("*")) for folder in folders]
    found = [] if listed[0] == listed[1] else [f"data: {listed[1]}, expected {listed[0]}"]
    if found:
        return found
    builders = [tfds.builder_from_directory(str(folder)) for folder in folders]
    for split in builders[0].info.splits:
        x, y = (Records(builder, split) for builder in builders)
        if len(x) != len(y) or any(x[i] != y[i] for i in range(len(x))):
            found.append(f"data: other records in {split}")
    return found


def files_differ(a, b, names):
    """Returns differences of files, by name or below a folder, by their bytes."""
    found = []
    for name in names:
        roots = [pathlib.Path(root, name) for root in (a, b)]
        listed = [
            {p.relative_to(root): p.read_bytes() for p in [root, *root.rglob("*")] if p.is_file()}
            for root in roots
        ]
        if listed[0].keys() != listed[1].keys():
            found.append(f"{name}: other files: {sorted(map(str, listed[0] ^ listed[1].keys()))}")
        found += [f"{name}/{p}" for p in listed[0] if listed[0][p] != listed[1].get(p)]
    return found


def leaves(workdir):
    """Counts the arrays and numbers of the last checkpoint, by section."""
    _, tree, _ = reader.read(workdir)
    return {name: len(jax.tree.leaves(part)) for name, part in tree.items()}
