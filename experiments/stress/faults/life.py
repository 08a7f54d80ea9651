# SPDX-License-Identifier: Apache-2.0
"""One process of a run: its output, its phase when it died, and the moment of the kill."""

import contextlib
import re
import subprocess
import threading
import time

import runs


class Life:
    """One process, from its start to its death; a thread reads its output."""

    def __init__(self, command, workdir, data_dir, environment):
        self.workdir, self.data_dir = workdir, data_dir
        self.lines: list[str] = []
        self._left = self._half_made() | self._temporary()  # by a process before this one
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def count(self, pattern):
        """Counts the lines so far that begin like this."""
        return sum(bool(re.match(pattern, line)) for line in list(self.lines))

    def _temporary(self):
        found = set()
        with contextlib.suppress(FileNotFoundError):
            for path in (self.workdir / "checkpoints").iterdir():
                if "orbax-checkpoint-tmp" in path.name:
                    found.add((path.name, path.stat().st_ino))
        return found

    def saving(self):
        """Saves under way."""
        return self._temporary() - self._left

    def _half_made(self):
        return {str(path) for path in self.data_dir.rglob("incomplete.*")}

    def preparing(self):
        """Returns whether this process is preparing a data set."""
        return bool(self._half_made() - self._left)

    def wait_for(self, condition):
        """True once it holds; False if the process ends first."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def phase(self):
        """Returns the phase in which the process stopped, from its output and files."""
        if self.count("stopped at|localglobal train: stopped"):
            return "stopped by itself, saved"
        if self.preparing():
            return "data preparation"
        if self.saving():
            return "save"
        if not self.count("run      "):
            return "start"
        if not self.count("compiled in"):
            return "first compile"
        told = [line for line in self.lines if re.match(r"step +\d+", line)]
        step = re.match(r"step +(\d+)(/\d+)?", told[-1]) if told else None
        if step and step[2] and not int(step[1]) % int(runs.KILLED["eval.every"]):
            return "evaluation"
        return "training"

    def end(self, how, rng):
        """Sends the signal, waits for the end, returns the exit code."""
        if how == "KILL":
            self.process.kill()
        else:
            self.process.terminate()
            if how == "TERM then KILL":
                time.sleep(float(rng.uniform(0, 0.4)))
                self.process.kill()
        return self.finish()

    def finish(self):
        """Waits for the end by itself."""
        code = self.process.wait()
        self._reader.join()
        self.process.stderr.close()
        return code


def await_moment(life, moment, rng, patience=1.0):
    """Returns when the moment has come; False if the process ended before.

    Then it waits a random time more, of `patience` times a few seconds.
    """
    if moment == "preparation":
        came, most = life.wait_for(life.preparing), 2.0
    elif moment == "start":
        came, most = True, 5.0
    elif moment == "compile":
        came, most = life.wait_for(lambda: life.count("run      ")), 3.0
    elif moment == "training":
        lines = int(rng.integers(1, 6))
        came, most = life.wait_for(lambda: life.count(r"step +\d+/") >= lines), 0.15
    elif moment == "evaluation":
        every = int(runs.KILLED["eval.every"])
        ours = "|".join(str(n) for n in range(every, int(runs.KILLED["steps"]) + 1, every))
        came, most = life.wait_for(lambda: life.count(rf"step +({ours})/")), 3.0
    else:
        sightings, seen = int(rng.integers(1, 4)), set()

        def nth_save():
            seen.update(life.saving())
            return len(seen) >= sightings

        came, most = life.wait_for(nth_save), 0.05
    if came:
        deadline = time.monotonic() + patience * float(rng.uniform(0, most))
        life.wait_for(lambda: time.monotonic() >= deadline)
    return came
