"""Restores a checkpoint with jax and orbax alone.

Usage: python plain_orbax.py STEP_FOLDER. Prints one JSON object about the parts it restored.
"""

import functools
import importlib.util
import json
import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

assert importlib.util.find_spec("localglobal_jax") is None

# [page]
step = pathlib.Path(sys.argv[1]).absolute()  # WORKDIR/checkpoints/20
document = json.loads((step / "metadata" / "metadata").read_text())
model = document["metadata"]["model"]  # lg.create_model(**model) builds the module
shapes = document["leaves"]  # {"variables/params/head/kernel": {"shape": [..], "dtype": ..}, ..}

whole = ocp.StandardCheckpointer().restore(step / "state")  # NumPy or JAX arrays, nested dicts


def nested(flat):
    """Returns nested dicts for a dict of paths."""
    tree = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        functools.reduce(lambda at, folder: at.setdefault(folder, {}), folders, tree)[name] = value
    return tree


def part(prefix, dtype=None, sharding=None):
    """Restores the arrays whose path begins with `prefix`, as nested dicts."""
    item = {
        path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
        for path, leaf in shapes.items()
        if path.startswith(prefix)
    }
    how = {
        path: ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype or leaf.dtype)
        for path, leaf in item.items()
    }
    args = ocp.args.PyTreeRestore(nested(item), restore_args=nested(how), transforms={})
    return ocp.PyTreeCheckpointer().restore(step / "state", args=args)


mesh = Mesh(np.array(jax.devices()), ("data",))
one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
params = part("variables/params/", sharding=one)
stage = part("variables/params/stage1/", sharding=one)
half = part("variables/params/", dtype=jnp.bfloat16, sharding=one)
spread = part("variables/params/", sharding=NamedSharding(mesh, PartitionSpec()))
# [page]


def total(tree):
    return float(sum(np.abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree)))


print(
    json.dumps(
        {
            "model": model,
            "whole": sorted(whole),
            "sums": [total(whole["variables"]["params"]), total(params), total(spread)],
            "stage": sorted(stage["variables"]["params"]),
            "half": sorted({str(leaf.dtype) for leaf in jax.tree.leaves(half)}),
            "devices": sorted({len(leaf.devices()) for leaf in jax.tree.leaves(spread)}),
        }
    )
)
