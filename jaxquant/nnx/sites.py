"""Where an NNX model multiplies: its modules by path, their weights, and the slot an operation goes into."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from jaxquant.attention import Attention
from jaxquant.conv import ConvGeneralDilated
from jaxquant.coverage import Tagged
from jaxquant.dot import DotGeneral
from jaxquant.nnx.modules import (
    Einsum,
    Learned,
    as_attribute,
    einsum_axes,
    is_learned,
    quantized_embed,
    read,
)
from jaxquant.rules import ATTENTION, Rule
from jaxquant.stacking import Stacking, agreeing, places

# A subclass before its base: the first that fits counts.
_KINDS: tuple[tuple[type, str], ...] = (
    (nnx.Linear, "linear"),
    (nnx.LinearGeneral, "linear"),
    (nnx.Einsum, "einsum"),
    (nnx.Conv, "conv"),
    (nnx.ConvTranspose, "conv_transpose"),
    (nnx.Embed, "embed"),
)
_SLOTS = {
    "linear": "dot_general",
    "embed": "dot_general",
    "einsum": "einsum_op",
    "conv": "conv_general_dilated",
    ATTENTION: "attention_fn",
}


@dataclasses.dataclass(frozen=True)
class Site:
    """One module with matrix products.

    Attributes:
        path: with slashes.
        kind: of `jaxquant.coverage.Row`.
        module: itself.
        weights: of all sites of its model: path, shape, and the shape of one layer's.
    """

    path: str
    kind: str
    module: Any
    weights: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = ()

    @property
    def slot(self) -> str:
        """The attribute that holds the module's operation."""
        return _SLOTS[self.kind]

    @property
    def operation(self) -> Any:
        """What is in the slot."""
        return getattr(self.module, self.slot, None) if self.kind in _SLOTS else None

    @property
    def weight(self) -> str:
        """The attribute that holds its weight; modules of attention have none."""
        return "embedding" if self.kind == "embed" else "kernel"

    @property
    def variable(self) -> Any:
        """The weight's variable; None for attention."""
        return None if self.kind == ATTENTION else getattr(self.module, self.weight)

    @property
    def axes(self) -> tuple[int, ...]:
        """What the product sums over, in the module's own weight."""
        module = self.module
        if self.kind == "embed":
            return (1,)
        if isinstance(module, nnx.LinearGeneral):
            first = len(module.batch_axis)
            return tuple(range(first, first + len(module.in_features)))
        if self.kind == "einsum":
            left = module.einsum_str.split(",")[0].replace("...", "")
            return einsum_axes(module.einsum_str, len(left))[1]
        return tuple(range(len(self.shape) - 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """One layer's weight, as the module's settings have it."""
        module = self.module
        if self.kind == "embed":
            return (module.num_embeddings, module.features)
        if self.kind in ("conv", "conv_transpose", "einsum"):
            return tuple(module.kernel_shape)
        if isinstance(module, nnx.LinearGeneral):
            return (*module.batch_axis.values(), *module.in_features, *module.out_features)
        return (module.in_features, module.out_features)

    @property
    def stacking(self) -> Stacking:
        """Along which axes vmap has stacked layers, where it has.

        The weight's shape beside one layer's tells; where that allows several places, the bias', and then
        that of the nearest layers; where these leave several too, the first counts.  What was taken of a
        weight then is looked at again where a layer uses it.

        Raises:
            ValueError: a weight that is none of a layer's own shape, nor several of them.
        """
        if self.kind == ATTENTION:
            return Stacking.along((), ())
        whole = tuple(read(self.variable).shape)
        found = places(whole, self.shape) if len(whole) != len(self.shape) else [()]
        if not found:
            raise ValueError(
                f"{self.path or 'the model'} has weights of shape {whole}, and one layer's is {self.shape}: "
                "they are no layers that nnx.vmap has stacked"
            )
        for rank, others in self._witnesses() if len(found) > 1 else ():
            found = agreeing(found, len(whole), others, rank) or found
        return Stacking.along(found[0], whole)

    def _witnesses(self) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
        """Where other arrays of the same layers are stacked: their ranks, and the axes that may be."""
        bias, own = getattr(self.module, "bias", None), self._bias_shape()
        if bias is not None and own is not None:
            yield len(bias.shape), places(bias.shape, own)
        parts = self.path.split("/")

        def nearness(path: str) -> int:
            pairs = zip(parts, path.split("/"), strict=False)
            return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

        for _, shape, own in sorted(self.weights, key=lambda w: nearness(w[0]), reverse=True):
            found = places(shape, own)
            if len(found) == 1 and found != [()]:
                yield len(shape), found

    def _bias_shape(self) -> tuple[int, ...] | None:
        """One layer's bias; None where the module's settings do not tell."""
        module = self.module
        if self.kind == "einsum":
            return None
        if isinstance(module, nnx.LinearGeneral):
            return (*module.batch_axis.values(), *module.out_features)
        return (module.out_features,) if hasattr(module, "out_features") else None


def sites(model: nnx.Module) -> dict[str, Site]:
    """The modules of a model that multiply matrices, by path.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(model, nnx.Module):
        hint = "; Linen modules go to jaxquant.linen" if hasattr(model, "apply") else ""
        raise ValueError(f"an NNX model is wanted; got {type(model).__name__}{hint}")
    found: dict[str, Site] = {}
    weights: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for path, module in nnx.iter_graph(model):
        kind = _kind(module)
        if kind is not None:
            name = "/".join(map(str, path))
            site = found[name] = Site(name, kind, module, weights)
            if isinstance(site.variable, nnx.Variable):
                weights.append((name, tuple(read(site.variable).shape), site.shape))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no module with a matrix product to quantize: no Linear, "
            "LinearGeneral, Einsum, Conv, Embed or attention_fn"
        )
    return found


def _kind(module: Any) -> str | None:
    for cls, kind in _KINDS:
        if isinstance(module, cls):
            return kind
    has_attention = isinstance(module, nnx.Module) and callable(
        getattr(module, "attention_fn", None)
    )
    return ATTENTION if has_attention else None


def base_of(module: Any) -> type | None:
    """The class of Flax's that a module with matrix products is of; None of a module of one's own."""
    bases = (*(cls for cls, _ in _KINDS), nnx.MultiHeadAttention)
    return next((cls for cls in bases if isinstance(module, cls)), None)


def put(site: Site, operation: Any) -> None:
    """Puts an operation into a module's slot."""
    if site.kind == "embed":
        # The variables and settings are the module's own; what it does with them changes.
        object.__setattr__(site.module, "__class__", quantized_embed(type(site.module)))
    setattr(site.module, site.slot, as_attribute(operation))


def install(site: Site, rule: Rule) -> None:
    """Gives a module what its rule says.

    Raises:
        ValueError: a module that cannot take it, with its path.
    """
    if rule.value is None:
        return
    if site.kind not in _SLOTS:
        raise ValueError(
            f"{site.path} is a {type(site.module).__name__}, which has no place for a quantized product; "
            f"a rule ('{site.path}', None) before the others leaves it in float"
        )
    _check_slot(site)
    put(site, _operation(site, rule))


def _check_slot(site: Site) -> None:
    operation = site.operation
    ours = (DotGeneral, ConvGeneralDilated, Einsum, Learned, Attention, Tagged)
    own_class = getattr(site.module, "dot_general_cls", None)
    if own_class is not None or not (isinstance(operation, ours) or _is_default(site)):
        raise ValueError(
            f"{site.path} has a {site.slot} of its own, {own_class or operation!r}, which a rule would "
            f"replace; a rule ('{site.path}', None) before the others keeps it"
        )
    if isinstance(site.variable, nnx.Variable) and _is_stored(read(site.variable)):
        raise ValueError(f"{site.path} is frozen already; quantize the model that it was made of")


def _is_default(site: Site) -> bool:
    defaults = {
        "linear": (None, jax.lax.dot_general),
        "embed": (None, jax.lax.dot_general),
        "conv": (jax.lax.conv_general_dilated,),
        "einsum": (jax.numpy.einsum,),
        ATTENTION: (nnx.dot_product_attention, jax.nn.dot_product_attention),
    }
    return any(site.operation is default for default in defaults[site.kind])


def _is_stored(weight: Any) -> bool:
    return hasattr(weight, "qvalue")


def _operation(site: Site, rule: Rule) -> Any:
    """A rule's recipe in the form that the module calls."""
    value = rule.value
    if isinstance(value, Attention):
        return value
    assert isinstance(value, DotGeneral)
    if site.kind == "embed" and value.forward.rhs is None:
        raise ValueError(
            f"{site.path} is an Embed, and {rule.label} leaves weights in float; "
            f"a rule ('{site.path}', None) before the others leaves it in float"
        )
    try:
        operation = as_kind(site.kind, value)
        if is_learned(value.forward.lhs) or is_learned(value.forward.rhs):
            return Learned(operation, read(site.variable), site.axes, site.stacking)
    except ValueError as error:
        raise ValueError(f"{site.path} cannot take {rule.label}: {error}") from None
    return operation


def as_kind(kind: str, value: DotGeneral) -> Any:
    """A product's recipe as a module of a kind calls it."""
    if kind == "conv":
        return ConvGeneralDilated(value.forward, value.dlhs, value.drhs)
    return Einsum(value) if kind == "einsum" else value
