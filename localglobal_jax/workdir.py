# SPDX-License-Identifier: Apache-2.0
"""A workdir belongs to one config. Another one is refused before anything in it is touched."""

import logging
import os
import pathlib

from localglobal_jax import configlib, schema

log = logging.getLogger(__name__)


def refuse_other(run: schema.Run, workdir: pathlib.Path) -> None:
    """Raises ValueError if `workdir` holds a run that would have given other numbers."""
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file: give a directory")
    file = workdir / "config.json"
    if not file.exists():
        if (workdir / "checkpoints").exists():
            raise ValueError(
                f"{workdir} has checkpoints but no config.json, so nobody knows what they are: "
                "restore the file or choose another --workdir"
            )
        return
    old = configlib.from_json(file.read_text()).model_dump()
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
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "config.json", configlib.to_json(run))


def write_atomically(file: pathlib.Path, text: str) -> None:
    """A reader, or a crash, sees the old file or the new one, never a part."""
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
