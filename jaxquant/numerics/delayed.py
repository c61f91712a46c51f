"""Delayed scaling: a range by the largest magnitudes of the steps before, as a pair of pure functions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.checks import check_whole
from jaxquant.formats import Format
from jaxquant.numerics.calibration import Range


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DelayedRange:
    """Largest magnitudes of the last steps, and the range that they give; arrays alone, to be saved as such.

    Attributes:
        history: largest magnitudes, the newest last; zero for steps that were not.
        value: the range of the next step.
    """

    history: jt.Float[jax.Array, " steps"]
    value: jt.Float[jax.Array, ""]

    def range(self) -> Range:
        """Returns the range of the next step, as a calibration."""
        return Range(self.value)


class Delayed(NamedTuple):
    """A pair of pure functions, as in optax.

    Attributes:
        init: from a format to a `DelayedRange` whose scale is 1.
        update: from (state, the step's largest magnitude) to the next.
    """

    init: Callable[[Format], DelayedRange]
    update: Callable[[DelayedRange, jax.Array], DelayedRange]


def delayed(
    history: int = 1024, margin: int = 0, by: Literal["max", "most_recent"] = "max"
) -> Delayed:
    """Delayed scaling: r_{t+1} = 2^margin · max(a_t, …, a_{t−n+1}), with a_t the largest magnitude of step t.

    A range that is not positive and finite leaves the one before.  So after a step whose largest magnitude is
    NaN or Inf the range is kept for as long as that is among the last n, as TransformerEngine's is.  What
    exceeds the range in a step is clipped in that step.  State has one shape for all steps, so that nothing
    is traced again.

    Args:
        history: n, of how many steps.
        margin: by how many powers of two the range is wider.
        by: the largest of the history, or the newest alone.

    Raises:
        ValueError: a history below 1, a margin that is not whole, another `by`.

    Source: Micikevicius et al. 2022, arXiv 2209.05433, and TransformerEngine's DelayedScaling.

    >>> from jaxquant.formats import E4M3
    >>> init, update = delayed(history=2)
    >>> state = init(E4M3)
    >>> for largest in (4.0, 2.0, 1.0):
    ...     state = update(state, jnp.float32(largest))
    >>> state.range()
    Range(value=Array(2., dtype=float32))
    """
    check_whole("history of delayed scaling", history, 1)
    if not isinstance(margin, int) or isinstance(margin, bool):
        raise ValueError(f"margin of delayed scaling is a whole number; got {margin!r}")
    if by not in ("max", "most_recent"):
        raise ValueError(f"delayed scaling is by 'max' or 'most_recent'; got {by!r}")
    return Delayed(
        functools.partial(_init, steps=history), functools.partial(_update, margin=margin, by=by)
    )


def _init(format: Format, steps: int) -> DelayedRange:
    return DelayedRange(jnp.zeros(steps, jnp.float32), jnp.asarray(format.max_value, jnp.float32))


def _update(state: DelayedRange, largest: jax.Array, margin: int, by: str) -> DelayedRange:
    newest = jnp.asarray(largest, jnp.float32).reshape(())
    # A maximum of 4096 numbers and more may lose a NaN (`jaxquant.numerics.reductions`), and no Inf.
    newest = jnp.where(newest < jnp.inf, newest, jnp.inf)
    history = jnp.concatenate([state.history[1:], newest[None]])
    wanted = (jnp.max(history) if by == "max" else newest) * 2.0**margin
    is_usable = (wanted > 0) & jnp.isfinite(wanted)
    return DelayedRange(history, jnp.where(is_usable, wanted, state.value))


@dataclasses.dataclass(frozen=True)
class delayed_absmax:
    """Marks a range by `delayed`, whose state rides with a model's.

    `jaxquant.nnx.quantize` puts that state beside the weight, and `jaxquant.functions.delayed` returns it.

    Args:
        history, margin, by: as of `delayed`.

    Raises:
        ValueError: as `delayed`; wherever it is called, for then no state has taken its place.

    >>> from jaxquant.formats import E4M3
    >>> delayed_absmax(history=16).pair.init(E4M3).history.shape
    (16,)
    """

    history: int = 1024
    margin: int = 0
    by: Literal["max", "most_recent"] = "max"

    def __post_init__(self):
        self.pair  # noqa: B018  # checks

    @property
    def pair(self) -> Delayed:
        """The functions of its state."""
        return delayed(self.history, self.margin, self.by)

    def __call__(self, x: jax.Array, axes: tuple[int, ...], format: Format) -> Range:
        raise ValueError(
            "ranges by delayed scaling are state that goes from step to step, and this product has none: "
            "jaxquant.nnx.quantize(model, rules, *inputs) puts it beside each weight, and "
            "jaxquant.functions.delayed(function, rules) returns it"
        )
