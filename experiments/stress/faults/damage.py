# SPDX-License-Identifier: Apache-2.0
"""Damages the files of a workdir, and checks that the damage is found."""

import logging
import subprocess

import numpy as np
import runs

from localglobal_jax.checkpoints import digests, manager, reader, workdir
from localglobal_jax.config import loading, schema, values
from localglobal_jax.data.text import tokenizers
from localglobal_jax.training import setup, verification
from localglobal_jax.training.reporting import metrics_log

SHORT = {"steps": "9", "checkpoint.every": "3", "checkpoint.keep": "3", "eval.every": "3"}
SHORT |= {"log.every": "2", "log.tensorboard": "false"}


def flip(data, bits):
    """Returns `data` with these bits, by number, flipped."""
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damages(data, rng, flips):
    """(name, the damaged bytes or None for a file that is gone), for one file."""
    size = 8 * len(data)
    if size:
        yield "first bit", flip(data, [0])
        yield "last bit", flip(data, [size - 1])
        for bit in rng.integers(0, size, flips):
            yield f"bit {bit}", flip(data, [int(bit)])
        for count in (2, 8, 64):
            bits = {int(bit) for bit in rng.integers(0, size, count)}
            yield f"{len(bits)} bits", flip(data, bits)
        yield "one byte shorter", data[:-1]
        yield "half", data[: len(data) // 2]
        yield "empty", b""
    yield "one byte longer", data + b"\0"
    yield "deleted", None


class Listening(logging.Handler):
    """Collects the log messages at ERROR."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())

    def __enter__(self):
        self.said.clear()
        logging.getLogger("localglobal_jax").addHandler(self)
        return self

    def __exit__(self, *error):
        logging.getLogger("localglobal_jax").removeHandler(self)


def damaged(path, contents):
    """Writes the damage; call the result to undo it."""
    before = path.read_bytes()
    if contents is None:
        path.unlink()
    else:
        path.write_bytes(contents)
    return lambda: path.write_bytes(before)


def bits(tree):
    """Path -> (dtype, shape, bytes)."""
    return {
        path: (str(x.dtype), x.shape, np.asarray(x).tobytes())
        for path, x in reader.flatten(tree)[0].items()
    }


class Checkpointed:
    """A workdir with three steps, and what restoring each of them gives."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        run = loading.read_json(folder / "config.json")
        self.template = setup.prepare_setup(run, folder).template
        self.run, self.hear = run, Listening()
        self.steps = [entry["step"] for entry in reader.inspect(folder)["steps"]]
        self.newest = folder / "checkpoints" / str(self.steps[-1])
        self.states = {step: bits(self.restore(step).state) for step in self.steps}

    def restore(self, step=None):
        """Restores as a resuming run does."""
        options = self.run.checkpoint
        return manager.Checkpoints(self.folder / "checkpoints", options).restore(
            self.template, step
        )

    def attempt(self, name, listed):
        """Resumes and calls ``inspect --verify`` with a damaged newest step; returns the results.

        Args:
          name: the damaged file.
          listed: the list of checksums was written after the damage.
        """
        with self.hear:
            found = self.restore()
        said = " ".join(self.hear.said)
        entry = reader.inspect(self.folder, verify=True)["steps"][-1]
        same = bits(found.state) == self.states[found.step]
        went_back = found.step == self.steps[-2]
        harmless = listed and found.step == self.steps[-1]  # a byte that nobody reads
        return {
            "restored": found.step,
            "identical": same,
            "said": said[:200],
            "named": name in said or (listed and bool(said)),
            "inspect": entry["error"],
            # Of a damage that the list takes for right, inspect sees the arrays only.
            "ok": same
            and (harmless or (went_back and bool(said) and (listed or bool(entry["error"])))),
            "harmless": harmless,
        }

    def files(self):
        """Returns the files of the newest step, largest last."""
        found = [path for path in self.newest.rglob("*") if path.is_file()]
        return sorted(found, key=lambda path: (path.stat().st_size, path))

    def every_file(self, rng, flips):
        """Yields one result for every damage of every file of the newest step."""
        for path in self.files():
            name = str(path.relative_to(self.newest))
            for damage, contents in damages(path.read_bytes(), rng, flips):
                undo = damaged(path, contents)
                result = self.attempt(name, listed=False)
                undo()
                yield {"what": "checkpoint", "file": name, "damage": damage, **result} | {
                    "ok": result["ok"] and result["named"]
                }

    def listed(self, rng, flips):
        """Yields results of flips whose checksums are in ``files.json``."""
        manifest = self.newest / digests.MANIFEST
        before = manifest.read_bytes()
        for path in self.files():
            if "state" not in path.parts or not path.stat().st_size:
                continue  # the document holds the digests; nothing but its own checksum guards it
            name = str(path.relative_to(self.newest))
            for bit in rng.integers(0, 8 * path.stat().st_size, flips):
                undo = damaged(path, flip(path.read_bytes(), [int(bit)]))
                digests.write_manifest(reader.epath.Path(self.newest))
                result = self.attempt(name, listed=True)
                undo()
                manifest.write_bytes(before)
                yield {"what": "listed", "file": name, "damage": f"bit {bit}", **result}

    def beside(self, rng, flips):
        """Yields results of damage to the files beside the checkpoints."""
        config = loading.read_json(self.folder / "config.json").model_dump()
        paths = [self.folder / "config.json", self.folder / "metrics.jsonl"]
        paths += sorted((self.folder / tokenizers.DIRECTORY).glob("*"))
        for path in paths:
            name = str(path.relative_to(self.folder))
            for damage, contents in damages(path.read_bytes(), rng, flips):
                undo = damaged(path, contents)
                listed = verification.check_files(self.folder, reader.inspect(self.folder)["steps"])
                inspect = [entry["error"] for entry in listed if entry["error"]]
                resumed, same = self.resume(name, config)
                undo()
                found = bool(inspect) and bool(resumed)
                yield {
                    "what": "beside",
                    "file": name,
                    "damage": damage,
                    "said": (resumed or "")[:200],
                    "inspect": inspect[0] if inspect else None,
                    "harmless": same,
                    "ok": found or same,
                }

    def resume(self, name, config):
        """Returns (the messages of a resuming run, whether it reads the same as before)."""
        try:
            if name == "config.json":
                workdir.refuse_other(self.run, self.folder)
                now = loading.read_json(self.folder / "config.json").model_dump()
                changed = set(values.difference(config, now))
                free = {f for f in changed if f.startswith(schema.MAY_CHANGE)}
                return None, changed == free
            if name == "metrics.jsonl":
                metadata = reader.document_of(
                    reader.epath.Path(self.folder / "checkpoints"), self.steps[-1]
                )["metadata"]
                now = metrics_log.checksum(self.folder, self.steps[-1])
                with self.hear:
                    metrics_log.Writer(
                        self.folder,
                        resume_step=self.steps[-1],
                        tensorboard=False,
                        expected=metadata["metrics_crc32"],
                    ).close()
                said = " ".join(self.hear.said)
                return said, now == metadata["metrics_crc32"]
            task = setup.create_task if name.endswith(tokenizers.INDEX) else None
            if task and not (self.folder / name).exists():
                task(self.run, workdir=self.folder)
            made = tokenizers.load(self.folder / tokenizers.DIRECTORY)
            return None, made is not None and made.source.dump() == self.words()
        except ValueError as error:
            return str(error), False

    def words(self):
        """Returns the vocabulary of the undamaged tokenizer."""
        return (self.folder / tokenizers.DIRECTORY / "joint.model").read_bytes()

    def all_steps(self, rng):
        """Damages every step: a real run must end with an error and change no file."""
        for step in self.steps:
            path = self.folder / "checkpoints" / str(step) / "state" / "_METADATA"
            path.write_bytes(flip(path.read_bytes(), [int(rng.integers(0, 800))]))
        before = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}
        arguments = runs.arguments(self.kind, self.folder, **SHORT)
        done = subprocess.run(
            runs.command(arguments),
            env=runs.environment(fast_compile=True),
            capture_output=True,
            text=True,
            check=False,
        )
        after = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}
        said = done.stderr.strip().splitlines()[-1]
        yield {
            "what": "all steps",
            "damage": "one bit in each",
            "exit": done.returncode,
            "said": said[:300],
            "ok": done.returncode == 1
            and "no valid checkpoint" in said
            and "Traceback" not in done.stderr
            and before == after,
        }
