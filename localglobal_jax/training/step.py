# SPDX-License-Identifier: Apache-2.0
"""The train step: a pure function from a state and a batch to the next state and its metrics."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from localglobal_jax.config import schema
from localglobal_jax.parallel import context
from localglobal_jax.parallel.placement import Partitioner
from localglobal_jax.training import divergence, freezing, optim
from localglobal_jax.training.divergence import Outcome
from localglobal_jax.training.tasks import Batch, Loss, Task, Variables


class State(flax.struct.PyTreeNode):
    """Everything that changes during training. Randomness is a function of (seed, step)."""

    step: Int[Array, ""]
    variables: Variables  # "params", and e.g. "batch_stats"
    optimizer: optax.OptState
    average: Variables  # moving average of the variables; empty if optim.ema is 0


def init_state(task: Task, optimizer: optax.GradientTransformation, run: schema.Run) -> State:
    """Returns the state at step 0. Pure, so that `jax.eval_shape` gives its shapes."""
    zeros = [jnp.zeros(x.shape, x.dtype) for x in task.inputs]
    variables = task.model.init(jax.random.key(run.seed), *zeros, train=False)
    return State(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        optimizer=optimizer.init(freezing.trained(variables["params"], run.optim.freeze)),
        average=jax.tree.map(jnp.copy, variables) if run.optim.ema else {},
    )


def start_from(state: State, variables: Variables) -> State:
    """Returns the state at step 0 with the given variables, for fine-tuning."""
    average = jax.tree.map(jnp.copy, variables) if state.average else {}
    return state.replace(variables=variables, average=average)


def check_batches(run: schema.Run, partitioner: Partitioner) -> None:
    """Raises ValueError unless every batch divides over devices, hosts and micro-batches."""
    (field, rows), parts = run.train_rows, run.optim.accumulate
    if rows % parts:
        raise ValueError(
            f"{field}={rows} is not divisible by optim.accumulate={parts} micro-batches"
        )
    name = field if parts == 1 else f"{field} / optim.accumulate"
    partitioner.check_batch(rows // parts, what=name)
    field, rows = run.eval_rows
    partitioner.check_batch(rows, what=field)


def make_update(
    task: Task, optimizer: optax.GradientTransformation, run: schema.Run
) -> Callable[[State, Batch], tuple[State, Outcome]]:
    """Binds `train_step` to a task and its optimizer: ``(state, batch) -> (state, outcome)``."""

    def update(state: State, batch: Batch) -> tuple[State, Outcome]:
        return train_step(
            state, batch, task=task, optimizer=optimizer, options=run.optim, seed=run.seed
        )

    return update


def train_step(
    state: State,
    batch: Batch,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    options: schema.Optim,
    seed: int,
) -> tuple[State, Outcome]:
    """Applies one update, by the gradient of the mean loss over the global batch.

    Parameters that ``freeze`` names stay as they are, see `freezing`.

    With ``skip_nonfinite`` a step whose loss or gradient is not finite increments the step and
    changes nothing else; its metrics are zeros.
    """
    key = context.device_key(jax.random.fold_in(jax.random.key(seed), state.step))
    gradient, loss = accumulated_gradient(
        task.loss, state.variables, batch, key, options.accumulate, freeze=options.freeze
    )
    gradient, collections = context.constrain_like_state((gradient, loss.collections))
    params = state.variables["params"]
    trained = freezing.trained(params, options.freeze)
    updates, opt_state = optimizer.update(gradient, state.optimizer, trained)
    trained = optax.apply_updates(trained, updates)
    variables = {**collections, "params": freezing.merged(trained, params)}
    average = state.average
    if options.ema:
        average = optim.ema(average, variables, options.ema, state.step)
    one = jnp.ones((), jnp.float32)
    squares = divergence.squares(gradient)
    sums = {**loss.metrics, "gradient_norm": (jnp.sqrt(jnp.sum(squares)), one)}
    finite = divergence.finite(loss.total, squares)
    after = State(state.step + 1, variables, opt_state, average)
    if options.skip_nonfinite:
        fine = finite.all()
        same = state.replace(step=after.step)
        after = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, same)
        sums = jax.tree.map(lambda x: jnp.where(fine, x, jnp.zeros_like(x)), sums)
    return after, Outcome(sums, finite)


def accumulated_gradient(
    loss_fn: Callable[[Variables, Batch, jax.Array], Loss],
    variables: Variables,
    batch: Batch,
    key: jax.Array,
    parts: int,
    *,
    freeze: tuple[str, ...] = (),
) -> tuple[PyTree, Loss]:
    """Returns the gradient of total / weight over `parts` micro-batches, one after the other.

    The gradient has None in place of the parameters that `freeze` names.

    The result equals that of one large batch except under BatchNorm, whose statistics are those of
    a micro-batch.
    """

    def part(variables: Variables, batch: Batch, key: jax.Array) -> tuple[PyTree, Loss]:
        params = variables["params"]
        marks = freezing.norm_marks(variables, freeze)

        def total(trained: PyTree) -> tuple[Array, Loss]:
            whole = freezing.merged(trained, params)
            loss = loss_fn({**variables, **marks, "params": whole}, batch, key)
            kept = {k: x for k, x in loss.collections.items() if k not in marks}
            return loss.total, loss._replace(collections=kept)

        return jax.grad(total, has_aux=True)(freezing.trained(params, freeze))

    if parts == 1:
        gradient, loss = part(variables, batch, key)
        collections = loss.collections
    else:
        # Micro-batch i holds every parts-th example, so that no example moves between devices.
        split = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
        )

        # Gradients are summed in the carry; stacked, they took 7.3 GiB for MUSE on WMT.
        def body(carry: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, Loss]:
            collections, before = carry
            gradient, loss = part({**variables, **collections}, *xs)
            after = jax.tree.map(jnp.add, before, gradient)
            return (loss.collections, after), loss._replace(collections={})

        collections = {k: v for k, v in variables.items() if k != "params"}
        trained = freezing.trained(variables["params"], freeze)
        nothing = jax.tree.map(jnp.zeros_like, trained)
        (collections, gradient), losses = jax.lax.scan(
            body, (collections, nothing), (split, jax.random.split(key, parts))
        )
        loss = jax.tree.map(lambda x: x.sum(0), losses)
    gradient, loss = context.sum_over_devices((gradient, loss._replace(collections={})))
    weight = jnp.where(loss.weight > 0, loss.weight, 1)  # 0 in a batch of damaged records only
    gradient = jax.tree.map(lambda g: g / weight, gradient)
    return gradient, loss._replace(collections=context.mean_over_devices(collections))
