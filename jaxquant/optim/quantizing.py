"""Hold the state of any optax transformation in pages of few bits."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxquant.checks import check_whole
from jaxquant.numerics.sharding import call_with_auto_axes, explicit_axes, spec_of
from jaxquant.optim.adapting import reallocate_bits
from jaxquant.optim.checks import trace_update, transformation
from jaxquant.optim.codecs import Codec
from jaxquant.optim.kernel_layout import apply_update_with_kernels, bytes_per_element
from jaxquant.optim.leaves import Leaf
from jaxquant.optim.named import without_codes
from jaxquant.optim.plans import default_codec, make_plan
from jaxquant.optim.policies import Policy
from jaxquant.optim.sharding_axes import Spec
from jaxquant.optim.state import QuantizedState, empty, first_specs, layout, with_leaf
from jaxquant.optim.traced_update import elementwise_by_group
from jaxquant.optim.tracing import Program
from jaxquant.optim.updating import apply_update

KERNELS = {"xla": apply_update, "pallas": apply_update_with_kernels}


_APPLY = "update_and_apply"  # of the update function: what `apply` calls


def _unsplit(path: str, shape: tuple[int, ...]) -> P:
    return P()


def quantize_state(
    tx: optax.GradientTransformation | optax.MultiSteps,
    policy: Policy,
    *,
    codec: Callable[[Leaf], Codec] = default_codec,
    seed: int = 0,
    shards: int | Sequence[int] | None = None,
    mesh: Mesh | None = None,
    axis: str | Sequence[str] = "data",
    spec: Spec = _unsplit,
    kernel: str = "xla",
    extra: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with its state in few bits.

    Element-wise optimizers (Adam, Lion, momentum) are updated one group of pages at a time: the group is
    decoded, updated and encoded, and no more than that is held in full precision.  Other optimizers (Muon's
    matrices, a norm over all momenta) need the state of a whole parameter, or of several, at once.
    `explain_full_decode` names these parameters and the reason.

    `inject_hyperparams`, `MultiSteps`, `apply_if_finite` and other wrappers go inside or around, as in plain
    optax.  Their fields are read and set in either order: `state.hyperparams`, `MultiSteps.has_updated`,
    `optax.tree_utils.tree_get` and `tree_set` (see `QuantizedState`).  Inside, arrays of a parameter's shape
    are treated as any slot: `MultiSteps`' sum of gradients stays unquantized.  Around, they are not part of
    the state.

    Updates are computed from the state before it is encoded, so rounding has an effect from the next step
    on.  Blocks whose state a step does not change keep their codes.  Results do not depend on how arrays are
    sharded.

    A gradient that is not finite spoils its whole block of 128 elements: wrap `optax.apply_if_finite` around
    or inside.  Derivatives pass through the updates of a step, not through the state from one step to the
    next.  Scales, tables and partly filled pages matter for small models.  Below about 100,000 elements,
    codes get fewer bits than the budget, and the smallest states are left unquantized, with a warning;
    `report` shows the bytes.

    Args:
        tx: any optax transformation, including chains, masks, schedules and `MultiSteps`.  Leaves that
            follow the parameters, or accumulate without bound, stay unquantized; `report` gives the reason.
        policy: how many bits each leaf has, such as `fixed` and `by_role`.
        codec: returns the codec of a leaf.
        seed: the seed of stochastic rounding.  Draws depend on it, on the step, and on the element's place.
        shards: the leading axis of all arrays of codes and scales, which devices share.  It must be a
            multiple of the mesh axis, which is the default; one number for each of several axes.  The bits
            depend on it and not on the mesh: two devices can resume what eight devices saved with eight
            shards.
        mesh: the mesh whose devices share the state.  Each device updates its own pages.
        axis: the mesh axis, or several.
        spec: returns the sharding of a parameter, given its path and shape.  The state is split along the
            same axes, so gradients are not moved to the state.  What `spec` does not split is split along
            the longest axis that the shards divide.
        kernel: "xla", or "pallas": kernels for one TPU (`jaxquant.optim.kernels`) and one shard, which CPUs
            interpret slowly.  Several TPUs can use them within `shard_map` only.
        extra: further arguments of the update by name, or their shapes, if it needs any that optax's own
            transformations do not: `init` traces the update to find the role of each leaf.

    Raises:
        ValueError: if an argument is invalid; at `init`, if nothing can be coded or a codec cannot hold its
            leaf; at `update`, if state, updates and parameters do not belong together, or a kernel cannot
            update them.

    >>> from jaxquant.optim.policies import fixed
    >>> tx = quantize_state(optax.adam(1e-1), fixed(8))
    >>> params = {"w": jnp.ones((64, 64))}
    >>> updates, state = jax.jit(tx.update)({"w": jnp.full((64, 64), 2.0)}, tx.init(params), params)
    >>> bool(jnp.allclose(updates["w"], -0.1))
    True
    """
    tx = transformation(tx)
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"tx must be an optax transformation; got {tx!r}")
    if not callable(codec):
        raise ValueError(f"codec must be a function from a Leaf to its codec; got {codec!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer; got {seed!r}")
    if not isinstance(policy, Policy):
        raise ValueError(
            f"policy must be a Policy, such as jaxquant.optim.fixed(4); got {policy!r}"
        )
    axis = (axis,) if isinstance(axis, str) else tuple(axis)
    counts = _check_shards(shards, mesh, axis)
    if not callable(spec):
        raise ValueError(
            f"spec must be a function from a path and a shape to a PartitionSpec; got {spec!r}"
        )
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
    if kernel == "pallas" and mesh is not None:
        raise ValueError(
            "kernel='pallas' takes no mesh; call it within jax.shard_map, or use 'xla'"
        )
    if kernel == "pallas" and max(counts.values()) > 1:
        raise ValueError(
            f"shards must be 1 for kernel='pallas'; got {shards} (kernel='xla' takes more)"
        )
    if extra is not None and not isinstance(extra, Mapping):
        raise ValueError(f"extra must be a mapping from names to values; got {extra!r}")
    tx = optax.with_extra_args_support(tx)
    # The state is shared on a mesh with axes of the type Auto only.
    shared = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)

    def init(params: Any) -> QuantizedState:
        plan = make_plan(tx, policy, codec, params, counts, spec, extra)
        plan = dataclasses.replace(plan, mesh=shared, axis=axis)

        def first(plain: Any, params: Any) -> QuantizedState:
            del params  # an operand only for its mesh, if the plain state is constant
            return placed(encoded(plan, plain, seed))

        with _within(mesh, params):
            plain = _first(tx, params)
            exact = without_codes(plan, plain)
            specs = functools.partial(first_specs, plan, exact, tx, params)
            return call_with_auto_axes(first, (plain, params), specs)

    def stepped(
        applies: bool, updates: Any, state: QuantizedState, params: Any, extra: dict
    ) -> Any:
        """Returns (updates, state), or with `applies` (parameters, state)."""

        def step(updates: Any, state: QuantizedState, params: Any, extra: dict[str, Any]) -> Any:
            traced = trace_update(tx, state, updates, params, extra)
            state = reallocate_bits(traced, state, seed)
            if applies:
                traced = trace_update(_applied(tx), state, updates, params, extra, onto="param")
            new, state = KERNELS[kernel](traced, state, seed)
            return traced.structure.unflatten(new), placed(state)

        operands = (updates, state, params, extra)
        return call_with_auto_axes(step, operands, lambda: jax.tree.map(spec_of, operands[:2]))

    def update(updates: Any, state: QuantizedState, params: Any = None, **extra: Any):
        return stepped(False, updates, state, params, extra)

    def apply(gradients: Any, state: QuantizedState, params: Any, **extra: Any):
        new, state = stepped(True, gradients, state, params, extra)
        return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(new)), state

    setattr(update, _APPLY, apply)

    def placed(state: QuantizedState) -> QuantizedState:
        return state if mesh is None else jax.lax.with_sharding_constraint(state, layout(state))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def apply(tx: Any, gradients: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
    """Returns (parameters, state) after a step: `tx.update` and `optax.apply_updates` in one.

    The results are bit for bit those of the two calls, each compiled by itself.  Here the updates of a
    `quantize_state` are added page by page and never stored, and where the caller donates the parameters
    they are overwritten where they lie.  For other transformations, such as a wrapper around a
    `quantize_state`, it is the two calls.

    Args:
        tx: an optax transformation.
        gradients: the gradients of the parameters.
        state: the state of `tx`, which the caller should donate too.
        params: the parameters.
        extra: further arguments of the update, by name.

    Raises:
        ValueError: as `tx.update` does.

    >>> from jaxquant.optim.policies import fixed
    >>> tx = quantize_state(optax.adam(1e-1), fixed(8))
    >>> params = {"w": jnp.ones((64, 64))}
    >>> step = jax.jit(lambda *args: apply(tx, *args), donate_argnums=(1, 2))
    >>> params, state = step({"w": jnp.full((64, 64), 2.0)}, tx.init(params), params)
    >>> bool(jnp.allclose(params["w"], 0.9))
    True
    """
    tx = optax.with_extra_args_support(transformation(tx))
    if hasattr(tx.update, _APPLY):
        return getattr(tx.update, _APPLY)(gradients, state, params, **extra)
    return _applied(tx).update(gradients, state, params, **extra)


def _applied(tx: Any) -> Any:
    """Returns `tx` with new parameters in place of updates."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = tx.update(updates, state, params, **extra)
        return optax.apply_updates(params, jax.tree.map(_rounded, updates)), state

    return optax.GradientTransformationExtraArgs(tx.init, update)  # pyright: ignore[reportArgumentType]


def _rounded(x: jax.Array) -> jax.Array:
    """Returns x, rounded before anything is added: a comparison keeps compilers from fusing the two."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where(x < jnp.inf, x, jnp.abs(x))


def _check_shards(shards: Any, mesh: Mesh | None, axis: tuple[str, ...]) -> dict[str, int]:
    """Returns the number of shards along each axis."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh; got {mesh!r}")
    if mesh is not None and AxisType.Manual in mesh.axis_types:
        raise ValueError(
            f"mesh must have axes of the types Auto or Explicit; got {mesh.axis_types}"
        )
    for name in axis:
        if mesh is not None and name not in mesh.shape:
            raise ValueError(f"axis must be one of the mesh's {tuple(mesh.shape)}; got {name!r}")
    if not axis or len(set(axis)) != len(axis):
        raise ValueError(f"axis must be one name or several different ones; got {axis}")
    sizes = [1 if mesh is None else mesh.shape[name] for name in axis]
    given = sizes if shards is None else [shards] if np.ndim(shards) == 0 else list(shards)
    if len(given) != len(axis):
        raise ValueError(f"shards must have one number for each axis of {axis}; got {shards}")
    for count, size, name in zip(given, sizes, axis, strict=True):
        check_whole("shards", count, 1)
        if count % size:
            raise ValueError(f"shards must be a multiple of {size}, the mesh's {name}; got {count}")
    return dict(zip(axis, given, strict=True))


def _within(mesh: Mesh | None, params: Any) -> contextlib.AbstractContextManager:
    """Sets a mesh for the first state: constants on a mesh of Explicit axes need one."""
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    is_traced = any(isinstance(x, Tracer) for x in arrays)
    if is_traced or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    meshes = [mesh, *(getattr(x.sharding, "mesh", None) for x in arrays)]
    own = next((m for m in meshes if isinstance(m, Mesh) and explicit_axes(m)), None)
    return contextlib.nullcontext() if own is None else jax.set_mesh(own)


def encoded(plan: Any, plain: Any, seed: int) -> QuantizedState:
    """Encodes a plain state, at the plan's initial widths."""
    leaves = jax.tree.leaves(plain)
    state = empty(plan, jax.tree.map(jnp.asarray, without_codes(plan, plain)))
    for number, group in enumerate(plan.groups):
        for i, slot in enumerate(group.leaves):
            for place, leaf in enumerate(slot):
                if not _is_zero(leaves[leaf.index]):
                    state = with_leaf(state, number, i, place, leaves[leaf.index], seed)
    return state


def _first(tx: Any, params: Any) -> Any:
    """Returns the first plain state.  Under a trace, leaves that are always zero are NumPy zeros.

    Otherwise the compiler would encode those constants itself, which takes seconds.
    """
    leaves, structure = jax.tree.flatten(tx.init(params))
    if not any(isinstance(leaf, Tracer) for leaf in leaves):
        return structure.unflatten(leaves)
    program = Program(tx.init, jax.eval_shape(lambda x: x, params))
    pairs = zip(leaves, program.outputs, strict=True)
    found = [np.zeros(x.shape, x.dtype) if program.is_zero(n) else x for x, n in pairs]
    return structure.unflatten(found)


def _is_zero(leaf: Any) -> bool:
    """Returns whether a leaf is known to be zero, as most are initially; `empty` already holds zeros."""
    if isinstance(leaf, Tracer):
        return False
    return not bool((np if isinstance(leaf, np.ndarray) else jnp).any(leaf))


def explain_full_decode(
    tx: optax.GradientTransformation, state: QuantizedState, params: Any, **extra: Any
) -> dict[str, str]:
    """Returns the parameters whose state a step decodes at once, by path, and the reason.

    The state of all other parameters is decoded one group of pages at a time.

    Args:
        tx: the wrapped transformation.
        state: the quantized state.
        params: the parameters, or their shapes.
        extra: further arguments of the update, by name.
    """
    return elementwise_by_group(trace_update(tx, state, params, params, extra), state.plan)[1]


def bytes_moved(
    tx: optax.GradientTransformation, state: QuantizedState, params: Any, **extra: Any
) -> dict[str, float]:
    """Returns the bytes that an update by kernels moves between a TPU's memory and core, per coded element.

    The numbers are *derived* from the blocks of the kernels and the rows of the tables, not measured.  AdamW
    in full precision moves 28.  Computation before the kernels, such as clipping a gradient, is not counted,
    and neither is adding the updates to the parameters.

    Args:
        tx: the wrapped transformation.
        state: the quantized state.
        params: the parameters, or their shapes.
        extra: further arguments of the update, by name.

    Returns:
        Bytes by purpose: "codes", "tables", "scales", "programs" (which update a block has), "operands"
        (gradients and parameters), "results", and "copies" of operands and results if parameters are copied
        into pages first, as all are whose rows do not fill tiles of 1024 numbers.

    >>> from jaxquant.optim.policies import fixed
    >>> tx, params = optax.adamw(1e-3), {"w": jnp.ones((64, 1024))}
    >>> found = bytes_moved(tx, quantize_state(tx, fixed(5, 3)).init(params), params)
    >>> found["codes"], found["operands"], found["results"]
    (2.0, 8.0, 4.0)
    """
    return bytes_per_element(trace_update(tx, state, params, params, extra), state)
