"""Statistics of a quantized model's products: its modules' calls give them while a loss is differentiated."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxquant.functions.monitoring import Place, check_loss, differentiated, places
from jaxquant.functions.quantizing import Decision
from jaxquant.nnx.calls import DOOR, Call, called
from jaxquant.nnx.doors import door_of, modules
from jaxquant.operations.monitoring import Monitored
from jaxquant.operations.tapped import Four

__all__ = ["monitor"]


def monitor(loss: Callable[..., jax.Array]) -> Callable[..., Monitored]:
    """Transforms a loss into a function of the same arguments that returns quantizer statistics of one step.

    As `jaxquant.functions.monitor`, for a model that `jaxquant.nnx.quantize` made.  Neither the model nor
    what it counts (running means, streams of random numbers) changes: the step after it computes what it
    would have computed.

    Args:
        loss: from (model, *args, **kwargs) to a scalar; it may call the model, its methods or parts of it.

    Returns:
        From the same arguments to statistics by product, as of `jaxquant.functions.monitor`; a product that
        the loss calls several times has those of all calls together.  Jit it (`nnx.jit`).

    Raises:
        ValueError: at the call, a model that is not quantized; no product that is; a result that is no
            scalar; what the model's own call refuses.

    >>> import jax
    >>> from jaxquant.nnx import quantize
    >>> model = quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), {".*": "int8_train"})
    >>> loss = lambda model, x: (model(x) ** 2).mean()
    >>> found = nnx.jit(monitor(loss))(model, jax.numpy.ones((2, 64)))
    >>> list(found), bool(found["kernel"].drhs.sqnr > 30)
    (['kernel'], True)
    """
    if not callable(loss):
        raise ValueError(f"a loss of a model is wanted; got {type(loss).__name__}")

    @functools.wraps(loss)
    def monitored(model: nnx.Module, *args: Any, **kwargs: Any) -> Monitored:
        door = door_of(model)
        if door is None:
            raise ValueError(
                f"a quantized model is wanted; got {type(model).__name__}: call jaxquant.nnx.quantize first"
            )
        call, given, _ = called(model, door.path, loss, args, kwargs, door.first)
        return _monitored(call, given)

    return monitored


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _monitored(call: Call, arrays: Sequence[Any]) -> Monitored:
    taps = Taps()

    def value(given: Mapping[str, Four]) -> jax.Array:
        nodes, args, kwargs = call.bind(arrays)
        for node in nodes:
            if isinstance(node, nnx.Module):
                taps.watch(node)
        assert callable(call.method)
        with taps.use(given):
            return check_loss(call.method(nodes[0], *args, **kwargs))

    jax.eval_shape(value, {})
    return differentiated(value, list(taps.places.values()))


class Taps:
    """The taps of all modules' calls, while a loss is traced.

    Attributes:
        places: of the products, by name.
    """

    def __init__(self):
        self.places: dict[str, Place] = {}
        self._given: Mapping[str, Four] = {}

    def watch(self, model: nnx.Module) -> None:
        """Makes a model's calls request their taps here."""
        for _, module in modules(model):
            if (door := door_of(module)) is not None:
                setattr(module, DOOR[0], nnx.static(dataclasses.replace(door, taps=self)))

    @contextlib.contextmanager
    def use(self, taps: Mapping[str, Four]) -> Iterator[None]:
        """Uses these taps, by location; None while the locations are collected."""
        self._given = taps
        try:
            yield
        finally:
            self._given = {}

    def of(self, decisions: Sequence[Decision]) -> dict[int, Four]:
        """Returns the taps of a call's products, by their numbers."""
        found = {}
        for index, place in places(decisions).items():
            name = self._placed(place)
            if name in self._given:
                found[index] = self._given[name]
        return found

    def _placed(self, place: Place) -> str:
        """Returns the name of a place, which it shares with that of other calls in as many turns."""
        for count in itertools.count(1):
            name = place.name if count == 1 else f"{place.name}#{count}"
            own = dataclasses.replace(place, name=name)
            if self.places.setdefault(name, own) == own:
                return name
        raise AssertionError
