# SPDX-License-Identifier: Apache-2.0
"""Prints the operations that take most of the time of one piece of work.

    python experiments/benchmarks/top.py infer coatnet_0 8         # arguments of ours.py

On a GPU these are its kernels; on CPU, XLA's operations.
"""

import collections
import gzip
import json
import pathlib
import sys
import tempfile

import jax
import ours

SHOWN = 15


def operations(folder):
    """Returns {operation: microseconds} of a trace."""
    (file,) = pathlib.Path(folder).rglob("*.trace.json.gz")
    with gzip.open(file) as opened:
        events = json.load(opened)["traceEvents"]
    found = collections.Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and name:
            found[name] += event["dur"]
    return found


def main(*command):
    go = ours.make(*command)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(go())
        found = operations(folder)
    total = sum(found.values())
    kinds = collections.Counter()
    for name, time in found.items():
        kinds[name.rstrip(".0123456789")] += time
    print(f"{total / 1e3:,.1f} ms in {len(found)} operations, on {jax.devices()[0].device_kind}")
    for title, times in (("by kind", kinds), ("one by one", found)):
        print(title)
        for name, time in times.most_common(SHOWN):
            print(f"{time / 1e3:10.2f} ms {time / total:6.1%}  {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
