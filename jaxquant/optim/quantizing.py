"""`quantize_state`: any optax transformation, its state held in pages of few bits."""

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

from jaxquant.numerics.sharding import computed_as_auto, explicit_axes, spec_of
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
    """`tx` with its state in few bits: decoded, updated and encoded again, some pages at a time.

    Where `tx` treats each element of a parameter's state by itself, as Adam, Lion and momentum do, one group
    of pages is decoded, updated and encoded before the next, and no more than that is ever held in full
    precision.  Where it does not (Muon's matrices, a norm over all momenta), a parameter's state, or that of
    all parameters that a result needs, is decoded whole for the step; `whole` says which, and why.

    `inject_hyperparams`, `MultiSteps`, `apply_if_finite` and other wrappers go inside or around, as in plain
    optax, and their fields are read and set in either order: `state.hyperparams`, `MultiSteps.has_updated`,
    `optax.tree_utils.tree_get` and `tree_set` (see `QuantizedState`).  Inside, what a wrapper holds of a
    parameter's shape is coded or stays exact as any slot does: `MultiSteps`' sum of gradients stays exact.
    Around, it is not looked at.

    Updates come from the state before it is encoded: rounding is felt from the next step on.  Blocks whose
    state a step leaves alone keep their codes.  Nothing depends on how arrays are sharded.

    A gradient that is not finite spoils the block of 128 elements that it is in, not its own element alone:
    wrap `optax.apply_if_finite` around or inside.  Derivatives pass through a step's updates, not through the
    state from one step to the next.  Scales, tables and half-empty pages weigh on small models: below some
    100,000 elements a budget buys fewer bits of codes than its number says, and of the smallest the state
    stays exact, with a warning; `report` shows what they take.

    Args:
        tx: any optax transformation: chains, masks, schedules and `MultiSteps` included.  What it keeps of
            parameters, or adds up without end, stays exact, and `report` says so.
        policy: how many bits each leaf has, as of `fixed` and `by_role`.
        codec: which codec serves a leaf.
        seed: of the draws, which are keyed by it, by the step and by the element's place.
        shards: the leading axis of every array of codes and scales, for devices to share: a multiple of the
            mesh's axis, which it is where not given; one number for each of several axes.  The bits depend on
            it, not on the mesh: what eight devices saved with eight shards, two go on with.
        mesh: whose devices share the state, each going through its own pages.
        axis: of the mesh, or several.
        spec: how a parameter of some path and shape is sharded.  Its state is cut along the same axes, so
            that no gradient moves to where its state is; what `spec` leaves whole is cut along the longest
            axis that the shards divide.
        kernel: "xla", or "pallas": kernels for one TPU (`jaxquant.optim.kernels`) and one shard, which CPUs
            interpret, slowly.  Several TPUs take them within `shard_map` only.
        extra: what its update is given by name, or shapes of it, where it needs any that optax's own do not:
            `init` traces the update, to find what each leaf of the state is.

    Raises:
        ValueError: arguments of another kind than these; at `init`, nothing that can be coded, or a codec
            that cannot hold its leaf; at `update`, a state, updates or parameters that do not belong
            together, or what a kernel cannot take.

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
    # What shares the state runs where all axes are Auto.
    shared = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)

    def init(params: Any) -> QuantizedState:
        plan = make_plan(tx, policy, codec, params, counts, spec, extra)
        plan = dataclasses.replace(plan, mesh=shared, axis=axis)

        def first(plain: Any, params: Any) -> QuantizedState:
            del params  # whose mesh counts where the plain state is of constants alone
            return placed(encoded(plan, plain, seed))

        with _within(mesh, params):
            plain = _first(tx, params)
            exact = without_codes(plan, plain)
            specs = functools.partial(first_specs, plan, exact, tx, params)
            return computed_as_auto(first, (plain, params), specs)

    def update(updates: Any, state: QuantizedState, params: Any = None, **extra: Any):
        def step(updates: Any, state: QuantizedState, params: Any, extra: dict[str, Any]) -> Any:
            traced = trace_update(tx, state, updates, params, extra)
            new, state = KERNELS[kernel](traced, reallocate_bits(traced, state, seed), seed)
            return traced.structure.unflatten(new), placed(state)

        operands = (updates, state, params, extra)
        return computed_as_auto(step, operands, lambda: jax.tree.map(spec_of, operands[:2]))

    def placed(state: QuantizedState) -> QuantizedState:
        return state if mesh is None else jax.lax.with_sharding_constraint(state, layout(state))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _check_shards(shards: Any, mesh: Mesh | None, axis: tuple[str, ...]) -> dict[str, int]:
    """How many shards there are to be along each axis."""
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
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"shards must be an integer of at least 1; got {count!r}")
        if count % size:
            raise ValueError(f"shards must be a multiple of {size}, the mesh's {name}; got {count}")
    return dict(zip(axis, given, strict=True))


def _within(mesh: Mesh | None, params: Any) -> contextlib.AbstractContextManager:
    """Where a first state is made: on a mesh of Explicit axes its constants need one that is set."""
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    is_traced = any(isinstance(x, Tracer) for x in arrays)
    if is_traced or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    meshes = [mesh, *(getattr(x.sharding, "mesh", None) for x in arrays)]
    own = next((m for m in meshes if isinstance(m, Mesh) and explicit_axes(m)), None)
    return contextlib.nullcontext() if own is None else jax.set_mesh(own)


def encoded(plan: Any, plain: Any, seed: int) -> QuantizedState:
    """A plain state in pages, at the plan's first widths."""
    leaves = jax.tree.leaves(plain)
    state = empty(plan, jax.tree.map(jnp.asarray, without_codes(plan, plain)))
    for number, group in enumerate(plan.groups):
        for i, slot in enumerate(group.leaves):
            for place, leaf in enumerate(slot):
                if not _is_zero(leaves[leaf.index]):
                    state = with_leaf(state, number, i, place, leaves[leaf.index], seed)
    return state


def _first(tx: Any, params: Any) -> Any:
    """The first plain state; while it is traced, with NumPy's zeros for leaves that are zeros always.

    A compiler would encode those as constants, which takes it seconds.
    """
    leaves, structure = jax.tree.flatten(tx.init(params))
    if not any(isinstance(leaf, Tracer) for leaf in leaves):
        return structure.unflatten(leaves)
    program = Program(tx.init, jax.eval_shape(lambda x: x, params))
    pairs = zip(leaves, program.outputs, strict=True)
    found = [np.zeros(x.shape, x.dtype) if program.is_zero(n) else x for x, n in pairs]
    return structure.unflatten(found)


def _is_zero(leaf: Any) -> bool:
    """Whether a leaf is known to be zeros, as most are at first: `empty` holds those already."""
    if isinstance(leaf, Tracer):
        return False
    return not bool((np if isinstance(leaf, np.ndarray) else jnp).any(leaf))


def explain_full_decode(
    tx: optax.GradientTransformation, state: QuantizedState, params: Any, **extra: Any
) -> dict[str, str]:
    """The parameters whose state a step decodes whole, by path, and why; the others go by groups of pages.

    Args:
        tx: what was wrapped.
        state: of the wrapped transformation.
        params: the parameters, or their shapes.
        extra: what its update is given by name.
    """
    return elementwise_by_group(trace_update(tx, state, params, params, extra), state.plan)[1]


def bytes_moved(
    tx: optax.GradientTransformation, state: QuantizedState, params: Any, **extra: Any
) -> dict[str, float]:
    """Bytes an element of coded state that an update by kernels moves between a TPU's memory and its core.

    *Derived*, from the blocks that the kernels ask for and the tables' rows; measured nowhere.  AdamW in full
    precision moves 28.  What is computed before the kernels, such as a clipped gradient, is not counted, nor
    is adding the updates to the parameters.

    Args:
        tx: what was wrapped.
        state: of the wrapped transformation.
        params: the parameters, or their shapes.
        extra: what its update is given by name.

    Returns:
        Bytes by what they are: "codes", "tables", "scales", "programs" (which update is a block's),
        "operands" (gradients and parameters), "results", and "copies" of those two where parameters are put
        together in pages first, as all are whose rows do not fill tiles of 1024 numbers.

    >>> from jaxquant.optim.policies import fixed
    >>> tx, params = optax.adamw(1e-3), {"w": jnp.ones((64, 1024))}
    >>> found = traffic(tx, quantize_state(tx, fixed(5, 3)).init(params), params)
    >>> found["codes"], found["operands"], found["results"]
    (2.0, 8.0, 4.0)
    """
    return bytes_per_element(trace_update(tx, state, params, params, extra), state)
