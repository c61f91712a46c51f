"""Where an NNX model multiplies: its modules by path, their weights, and the slot an operation goes into."""

import dataclasses
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
    """

    path: str
    kind: str
    module: Any

    @property
    def slot(self) -> str:
        """The attribute that holds the module's operation."""
        return _SLOTS[self.kind]

    @property
    def operation(self) -> Any:
        """What is in the slot."""
        return getattr(self.module, self.slot, None) if self.kind in _SLOTS else None

    @property
    def variable(self) -> Any:
        """The weight's variable; None for attention."""
        if self.kind == ATTENTION:
            return None
        return self.module.embedding if self.kind == "embed" else self.module.kernel

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
        return tuple(range(self.rank - 1))

    @property
    def rank(self) -> int:
        """Axes of the module's own weight, without those along which modules are stacked."""
        module = self.module
        if self.kind in ("conv", "conv_transpose", "einsum"):
            return len(module.kernel_shape)
        if isinstance(module, nnx.LinearGeneral):
            parts = (module.batch_axis, module.in_features, module.out_features)
            return sum(map(len, parts))
        return 2

    @property
    def stacked(self) -> int:
        """Leading axes that vmap or scan has put before the weight's own.

        Raises:
            ValueError: a weight of fewer axes than the module's own.
        """
        if self.kind == ATTENTION:
            return 0
        extra = len(read(self.variable).shape) - self.rank
        if extra < 0:
            raise ValueError(
                f"{self.path} has a weight of {self.rank + extra} axes, not {self.rank}"
            )
        return extra


def sites(model: nnx.Module) -> dict[str, Site]:
    """The modules of a model that multiply matrices, by path.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(model, nnx.Module):
        hint = "; Linen modules go to jaxquant.linen" if hasattr(model, "apply") else ""
        raise ValueError(f"an NNX model is wanted; got {type(model).__name__}{hint}")
    found = {}
    for path, module in nnx.iter_graph(model):
        kind = _kind(module)
        if kind is not None:
            name = "/".join(map(str, path))
            found[name] = Site(name, kind, module)
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
            return Learned(operation, read(site.variable), site.axes, site.stacked)
    except ValueError as error:
        raise ValueError(f"{site.path} cannot take {rule.label}: {error}") from None
    return operation


def as_kind(kind: str, value: DotGeneral) -> Any:
    """A product's recipe as a module of a kind calls it."""
    if kind == "conv":
        return ConvGeneralDilated(value.forward, value.dlhs, value.drhs)
    return Einsum(value) if kind == "einsum" else value
