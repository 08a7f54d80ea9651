# SPDX-License-Identifier: Apache-2.0
"""Mesh, shardings and compiled steps of a run.

A mesh has up to three axes: "data" and "fsdp" split the batch, "fsdp" also the parameters (each
device keeps a part and gathers a layer when it needs it, arXiv 1910.02054, stage 3), "model" splits
heads, hidden channels and vocabularies (tensor parallelism, arXiv 1909.08053, section 3).
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from localglobal_jax.config import schema
from localglobal_jax.parallel import context, sharding


def make_mesh(
    shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh over all devices, e.g. ``{"data": -1}``; -1: the devices that remain.

    `devices`: others than those of this machine, e.g. of a topology that is only compiled for.

    Raises ValueError if the axes do not multiply to the number of devices.
    """
    shape = dict(shape or {"data": -1})
    count = jax.device_count() if devices is None else len(devices)
    fixed = int(np.prod([n for n in shape.values() if n != -1]))
    free = [axis for axis, n in shape.items() if n == -1]
    if (
        not {"data"} <= shape.keys() <= {*sharding.AXES}
        or len(free) > 1
        or any(n < 1 for n in shape.values() if n != -1)
        or count % fixed
    ):
        raise ValueError(
            f"parallel.mesh={shape} does not fit {count} device(s) (--config.parallel.mesh and "
            ".strategy may change at any time): it needs an axis named "
            '"data", may have "fsdp" and "model", at most one of them -1, and sizes whose product '
            f"divides {count}"
        )
    if free:
        shape[free[0]] = count // fixed
    elif fixed != count:
        raise ValueError(
            f"parallel.mesh={shape} uses {fixed} of {count} devices; "
            "set one axis to -1 to use all of them"
        )
    # Not jax.make_mesh: it refuses an axis of 16 on 8x8x8 chips of a v5p, whose rows are of 8.
    laid_out = mesh_utils.create_device_mesh(
        tuple(shape.values()), devices, allow_split_physical_axes=True
    )
    # The default, Explicit axes, breaks linen's Embed, Dropout and reshapes.
    return Mesh(laid_out, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


CACHE = "jax_compilation_cache_dir"
_CACHES: set[str | None] = set()  # directories that `use_compilation_cache` has set


def use_compilation_cache(directory: str | None) -> None:
    """Caches compiled programs in `directory`, see `schema.Parallel`; only host 0 writes.

    Not on CPU unless a directory is named: a program there is tied to the kind of CPU, and writing
    one (jaxlib 0.10.2) has crashed the interpreter in a long process.
    """
    if directory == "auto":
        if getattr(jax.config, CACHE) not in (None, *_CACHES):  # the user's own
            return
        on_cpu = jax.default_backend() == "cpu"
        directory = None if on_cpu else os.path.expanduser("~/.cache/localglobal/xla")
    _CACHES.add(directory)
    jax.config.update(CACHE, directory)


def placeholder_devices(count: int | None = None) -> list[jax.Device]:
    """Returns `count` placeholder devices (None: as many as exist), to validate a mesh."""
    return [jax.devices()[0]] * (jax.device_count() if count is None else count)


class Partitioner:
    """Places the arrays of a run on a mesh by a sharding strategy, and compiles its steps.

    Raises ValueError if the axes of the mesh do not multiply to the number of devices.
    """

    def __init__(
        self,
        options: schema.Parallel | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        options = options or schema.Parallel()
        self.mesh = make_mesh(options.mesh, devices)
        self.strategy, self.compile = options.strategy, options.compile
        self._stack_options = context.StackOptions(
            remat=options.remat == "blocks",
            scan=options.scan,
            gather=self._whole if "fsdp" in options.strategy else None,
        )
        self._global_norm = options.batch_norm == "global"
        self._implementation = options.implementation
        # "gpu" may be CUDA or ROCm; other devices than this machine's are only compiled for
        here = jax.default_backend() if devices is None else "gpu"
        self._platform = None if here == "gpu" else here
        self._batch = tuple(axis for axis in sharding.BATCH_AXES if axis in self.mesh.shape)

    @property
    def batch_parts(self) -> int:
        """Returns the number of parts into which the batch is split."""
        return int(np.prod([self.mesh.shape[axis] for axis in self._batch]))

    @property
    def shard(self) -> tuple[int, int]:
        """Returns (i, n): this host reads part i of n of every batch.

        Hosts whose devices hold the same rows, along "model", read the same part.
        """
        axes = tuple(self.mesh.shape)
        order = [axes.index(axis) for axis in self._batch]
        sizes = [self.mesh.shape[axis] for axis in self._batch]
        rows: dict[int, set[int]] = {}
        for place, device in np.ndenumerate(self.mesh.devices):
            row = int(np.ravel_multi_index([place[i] for i in order], sizes))
            rows.setdefault(device.process_index, set()).add(row)
        parts = sorted({tuple(sorted(part)) for part in rows.values()})
        if sum(map(len, parts)) != self.batch_parts:
            raise ValueError(
                f"parallel.mesh={dict(self.mesh.shape)}: hosts would share some rows of a batch "
                'but not all: give "model" a size that divides the devices of a host, or the other '
                "way round"
            )
        mine = rows[jax.process_index()] if jax.process_index() in rows else rows[min(rows)]
        return parts.index(tuple(sorted(mine))), len(parts)

    def check_batch(self, batch_size: int, *, what: str = "batch_size") -> None:
        """Raises ValueError unless the global batch divides over the devices that split it."""
        parts = self.batch_parts
        if batch_size % parts:
            lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            raise ValueError(
                f"{what}={batch_size} is not divisible by the {parts} devices that split the "
                f"batch: use {nearest}"
            )

    def split(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a global batch, with their shardings."""
        where = self._batched()
        return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for k, x in batch.items()}

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Returns the spec of the array at `path` ("variables/params/stem/conv1/kernel")."""
        return sharding.spec(path, shape, self.strategy, self.mesh.shape)

    def shardings(self, tree: PyTree) -> PyTree:
        """Returns the sharding of every leaf of a state, of variables, or of their shapes."""

        def where(path: Any, leaf: Any) -> NamedSharding:
            return NamedSharding(self.mesh, self.spec(_name(path), tuple(leaf.shape)))

        return jax.tree_util.tree_map_with_path(where, tree)

    def template(self, shapes: PyTree) -> PyTree:
        """Returns the shapes with their shardings, to restore into."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self.shardings(shapes),
        )

    def put(self, tree: PyTree) -> PyTree:
        """Moves arrays of the host to the devices of their shardings."""
        return jax.device_put(tree, self.shardings(tree))

    def train_batch(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """Turns this host's rows of a batch into the input of the compiled step."""
        if self.compile == "pmap":
            local = jax.local_device_count()
            return {k: v.reshape(local, -1, *v.shape[1:]) for k, v in batch.items()}
        return self.global_batch(batch)

    def global_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Turns this host's rows of a batch into global arrays, sharded over the devices."""
        return {
            key: jax.make_array_from_process_local_data(self._batched(), value)
            for key, value in batch.items()
        }

    def _batched(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self._batch))

    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _whole(self, params: PyTree) -> PyTree:
        """Gathers the parameters of a block over "fsdp"."""

        def whole(path: Any, leaf: jax.Array) -> jax.Array:
            spec = self.spec("/" + _name(path), leaf.shape)
            if "fsdp" not in spec:
                return leaf
            rest = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
            return sharding.gather(
                leaf, NamedSharding(self.mesh, spec), NamedSharding(self.mesh, rest)
            )

        return jax.tree_util.tree_map_with_path(whole, params)

    def _like_state(self, tree: PyTree) -> PyTree:
        """Constrains a tree whose paths end like those of the state to the state's shardings."""

        def constrained(path: Any, leaf: jax.Array) -> jax.Array:
            where = NamedSharding(self.mesh, self.spec("/" + _name(path), leaf.shape))
            return jax.lax.with_sharding_constraint(leaf, where)

        return jax.tree_util.tree_map_with_path(constrained, tree)

    @contextmanager
    def _tracing(self, axis: str | None = None) -> Iterator[None]:
        """Context manager for tracing a step: settings of this run for the code inside it."""
        split = self.strategy != "replicate"

        def whole(x: jax.Array, free: int) -> jax.Array:
            if self.compile == "pmap" or self.mesh.size == 1:
                return x
            axes: list[Any] = [None] * x.ndim
            axes[free] = PartitionSpec.UNCONSTRAINED
            return jax.lax.with_sharding_constraint(
                x, NamedSharding(self.mesh, PartitionSpec(*axes))
            )

        settings = context.tracing(
            edge=lambda x: jax.lax.with_sharding_constraint(x, self._batched()) if split else x,
            whole=whole,
            state=self._like_state if "tensor" in self.strategy else lambda x: x,
            axis=axis,
            norm_axis=axis if self._global_norm else None,
            options=self._stack_options,
            platform=self._platform,
        )
        with settings, context.implementation(self._implementation):
            yield

    def compile_init(self, init: Callable[[], Any]) -> Callable[[], Any]:
        """Compiles a function without arguments that makes a state.

        Runs once, so it is compiled without optimisation: five times faster for XLA's random
        numbers.
        """
        return jax.jit(
            init,
            out_shardings=self.shardings(jax.eval_shape(init)),
            compiler_options={"xla_backend_optimization_level": 0},
        )

    def compile_step(self, step: Callable[..., Any], state: PyTree) -> Callable[..., Any]:
        """Compiles ``(state, batch) -> (state, metrics)``; the state is donated.

        `state`: its shapes. Under pmap it is the same on every device, and the step has to use
        `context.sum_over_devices`.
        """

        axis = "data" if self.compile == "pmap" else None

        def traced(state: PyTree, batch: PyTree) -> Any:
            with self._tracing(axis):
                return step(state, batch)

        if axis:
            return self._on_many_hosts(
                jax.pmap(traced, axis_name=axis, in_axes=(None, 0), out_axes=None)
            )
        shardings = self.shardings(state)
        return jax.jit(
            traced,
            in_shardings=(shardings, self._batched()),
            out_shardings=(shardings, self._replicated()),
            donate_argnums=0,
        )

    def _on_many_hosts(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Lets a pmapped step of several hosts take and return global, replicated arrays.

        pmap's own arrays are of the devices of one host. Nothing is copied between devices.
        """
        if jax.process_count() == 1:
            return step
        here = Mesh(np.asarray(self.mesh.local_devices), ("data",))
        local, everywhere = NamedSharding(here, PartitionSpec()), self._replicated()

        def seen_by(sharding: NamedSharding, tree: PyTree) -> PyTree:
            def moved(x: jax.Array) -> jax.Array:
                parts = [shard.data for shard in x.addressable_shards]
                return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

            return jax.tree.map(moved, tree)

        return lambda state, batch: seen_by(everywhere, step(seen_by(local, state), batch))

    def compile_eval(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles ``(variables, batch) -> metrics``; variables keep their shardings."""

        def traced(variables: PyTree, batch: PyTree) -> Any:
            with self._tracing():
                return step(variables, batch)

        return jax.jit(traced, out_shardings=self._replicated())


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe() -> str:
    """Returns the devices and hosts of this run: ``"2 x cpu (cpu), 1 host"``."""
    device, hosts = jax.devices()[0], jax.process_count()
    plural = "" if hosts == 1 else "s"
    return f"{jax.device_count()} x {device.device_kind} ({device.platform}), {hosts} host{plural}"
