# SPDX-License-Identifier: Apache-2.0
"""A workdir belongs to one config. Another one is refused before anything in it is touched."""

import logging
import os
import pathlib

from localglobal_jax import configlib, schema

log = logging.getLogger(__name__)


def refuse_other(run: schema.Run, workdir: pathlib.Path) -> None:
    """Raises ValueError if `workdir` holds a run that would have given other numbers."""
    try:
        existing = next(path for path in (workdir, *workdir.parents) if path.exists())
    except OSError as error:  # no path at all, such as one of a thousand letters
        raise ValueError(f"--workdir: {error.strerror}: {str(workdir)[:200]}") from error
    if not existing.is_dir():
        raise ValueError(f"--workdir {workdir}: {existing} is a file, give a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--workdir {workdir}: no permission to write in {existing}")
    file = workdir / "config.json"
    if not file.exists():
        for name in ("checkpoints", "metrics.jsonl", "tensorboard"):
            if (workdir / name).exists():
                raise ValueError(
                    f"{workdir} has {name} but no config.json, so nobody knows what it is of: "
                    "restore the file or choose another --workdir"
                )
        return
    old = configlib.read_json(file).model_dump()
    changed = {
        field: values
        for field, values in configlib.difference(old, run.model_dump()).items()
        if not any(field == free or field.startswith(f"{free}.") for free in schema.MAY_CHANGE)
    }
    if changed:
        lines = [f"  {field}: {was!r} there, {now!r} now" for field, (was, now) in changed.items()]
        raise ValueError(
            f"{workdir} belongs to a run with another config:\n" + "\n".join(lines) + "\n"
            "Choose another --workdir, or give the same config to resume. "
            f"(These may change: {', '.join(schema.MAY_CHANGE)}.)"
        )


def claim(run: schema.Run, workdir: pathlib.Path) -> None:
    """Writes `config.json`, atomically."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir {workdir} cannot be made: {error.strerror}") from error
    write_atomically(workdir / "config.json", configlib.to_json(run))


def check_shared(workdir: pathlib.Path) -> None:
    """Raises ValueError on a host that does not see what host 0 has claimed."""
    if not (workdir / "config.json").exists():
        raise ValueError(
            f"--workdir {workdir} is not the directory that host 0 sees there: all hosts need a "
            "file system that they share"
        )


def write_atomically(file: pathlib.Path, text: str) -> None:
    """A reader, or a crash, sees the old file or the new one, never a part."""
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
