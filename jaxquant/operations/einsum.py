"""`einsum`: Einstein summation of two operands through a (quantized) `dot_general`."""

import string
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.numerics.qarray import QArray

_ELLIPSIS = "..."


def einsum(
    subscripts: str,
    lhs: jax.Array | QArray,
    rhs: jax.Array | QArray,
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """Einstein summation as one matrix product: out = Σ lhs · rhs over the labels that are not put out.

    A label of both operands is a batch axis where it is put out, and summed over where it is not; a label
    of one operand is a free axis.  lhs stays the left operand and rhs the right one, so that each is
    quantized by its own quantizer.

    Args:
        subscripts: as of `jnp.einsum`, such as ``"btd,dhk->bthk"``; the output may be left out, and an
            ellipsis stands for axes that both operands have alike, or only one has.
        lhs: left operand (activations).
        rhs: right operand (weights).
        dot_general: the product, with `jax.lax.dot_general`'s signature: a `DotGeneral` or a recipe.
        precision: as of `jax.lax.dot_general`.
        preferred_element_type: as of `jax.lax.dot_general`.
        out_sharding: of the result, a PartitionSpec or NamedSharding, as of `jnp.einsum`.

    Raises:
        ValueError: subscripts that are not those of two operands or do not fit their shapes; a label that
            an operand has twice; a label of one operand that is not put out; a dot_general that cannot
            be called.

    >>> from jaxquant.operations.recipes import recipe
    >>> x, w = jnp.array([[[1.0, -127.0]]]), jnp.array([[127.0], [2.0]])
    >>> einsum("btd,dk->bkt", x, w, recipe("w8a8"))
    Array([[[-127.]]], dtype=float32)
    """
    if not callable(dot_general):
        raise ValueError(
            "dot_general is a callable with jax.lax.dot_general's signature, as recipe('w8a8') gives; "
            f"got {dot_general!r}"
        )
    left, right, out = _parse(subscripts, lhs.ndim, rhs.ndim)
    _check_labels(subscripts, left, right, out)
    _check_sizes(subscripts, dict(zip(left, lhs.shape, strict=True)), right, rhs.shape)
    batch = [x for x in left if x in right and x in out]
    summed = [x for x in left if x in right and x not in out]
    # jnp.einsum may swap its operands on the way to the product, which would give activations the
    # quantizer of the weights; here the product is called once, with lhs on the left.
    numbers = (
        (tuple(map(left.index, summed)), tuple(map(right.index, summed))),
        (tuple(map(left.index, batch)), tuple(map(right.index, batch))),
    )
    if preferred_element_type is None and lhs.dtype != rhs.dtype:
        # As jnp.einsum, whose types are NumPy's; lax has a rule of its own for float16 by bfloat16.
        with jax.numpy_dtype_promotion("standard"):
            preferred_element_type = jnp.result_type(lhs.dtype, rhs.dtype)
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    free = [x for x in (*left, *right) if x not in batch and x not in summed]
    order = [*batch, *free]  # of the product's axes
    if out_sharding is not None:
        options["out_sharding"] = _permuted(out_sharding, [out.index(x) for x in order])
    result = dot_general(lhs, rhs, numbers, **options)
    return jnp.transpose(result, tuple(map(order.index, out)))


def _permuted(sharding: Any, order: list[int]) -> Any:
    """Returns the sharding of an array whose axes come in another order."""
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    parts = [*spec, *[None] * (len(order) - len(spec))]
    spec = PartitionSpec(*(parts[a] for a in order))
    return NamedSharding(sharding.mesh, spec) if isinstance(sharding, NamedSharding) else spec


def _parse(subscripts: Any, lhs_ndim: int, rhs_ndim: int) -> tuple[list[str], list[str], list[str]]:
    """Returns one label per axis for lhs, rhs and the output; the axes of an ellipsis are "...0", "...1"."""
    if not isinstance(subscripts, str):
        raise ValueError(f"subscripts is a string such as 'ij,jk->ik'; got {subscripts!r}")
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise ValueError(f"einsum takes two operands; subscripts {subscripts!r} name {len(terms)}")
    left, right = (
        _labels(subscripts, term, ndim)
        for term, ndim in zip(terms, (lhs_ndim, rhs_ndim), strict=True)
    )
    hidden = max((_hidden(left), _hidden(right)), key=len)
    if _ELLIPSIS in terms[0] and _ELLIPSIS in terms[1] and _hidden(left) != _hidden(right):
        raise ValueError(
            f"the ellipsis in {subscripts!r} stands for {len(_hidden(left))} axes of lhs and "
            f"{len(_hidden(right))} of rhs; it must stand for as many in both"
        )
    if _ELLIPSIS in output and _ELLIPSIS not in inputs:
        raise ValueError(f"{subscripts!r} puts out an ellipsis, and no operand has an ellipsis")
    if arrow:
        return left, right, _labels(subscripts, output, hidden=hidden)
    # As in NumPy: the ellipsis first, then what occurs once, in the alphabet's order.
    once = sorted(x for x, n in Counter(left + right).items() if n == 1 and x not in hidden)
    return left, right, [*hidden, *once]


def _hidden(labels: list[str]) -> list[str]:
    return [x for x in labels if x.startswith(_ELLIPSIS)]


def _labels(
    subscripts: str, term: str, ndim: int | None = None, hidden: list[str] | None = None
) -> list[str]:
    """Returns one term's labels, an ellipsis expanded to the rest of `ndim`, or to `hidden`."""
    before, dots, after = term.partition(_ELLIPSIS)
    for x in before + after:
        if x not in string.ascii_letters:
            raise ValueError(
                f"labels are letters, with at most one ellipsis to a term; {subscripts!r} has {x!r}"
            )
    named = len(before) + len(after)
    if ndim is not None:
        if named > ndim or (named < ndim and not dots):
            raise ValueError(
                f"{term!r} of {subscripts!r} labels {named} axes; its operand has {ndim}"
            )
        hidden = [f"{_ELLIPSIS}{i}" for i in range(ndim - named)]
    return [*before, *(hidden or [] if dots else []), *after]


def _check_labels(subscripts: str, left: list[str], right: list[str], out: list[str]) -> None:
    for name, labels in (("lhs", left), ("rhs", right), ("the output", out)):
        twice = [x for x, n in Counter(labels).items() if n > 1]
        if twice:
            raise ValueError(
                f"label {twice[0]!r} occurs twice in {name} of {subscripts!r}; take the diagonal beforehand"
            )
    unknown = [x for x in out if x not in left and x not in right]
    if unknown:
        raise ValueError(
            f"label {unknown[0]!r} is put out by {subscripts!r}, but no operand has it"
        )
    for name, labels, other in (("lhs", left, right), ("rhs", right, left)):
        lost = [x for x in labels if x not in other and x not in out]
        if lost:
            # Summing first would be the same number in floats; quantized, it would be the sum that is
            # quantized and not the operand.
            raise ValueError(
                f"label {lost[0]!r} of {subscripts!r} is only in {name} and not put out; sum over it "
                "beforehand if the sum is what is to be quantized, or put it out and sum afterwards"
            )


def _check_sizes(
    subscripts: str, sizes: dict[str, int], right: list[str], shape: tuple[int, ...]
) -> None:
    """Raises a ValueError unless all axes of a label have one size; none is broadcast."""
    for label, n in zip(right, shape, strict=True):
        if sizes.get(label, n) != n:
            raise ValueError(
                f"label {label!r} of {subscripts!r} has size {sizes[label]} in lhs and {n} in rhs"
            )
