"""Where a Linen module multiplies: calls of its submodules, and how they run with another operation."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.attention import Attention
from jaxquant.conv import ConvGeneralDilated
from jaxquant.dot import DotGeneral, simulate
from jaxquant.einsum import einsum
from jaxquant.product import materialized, rows_of
from jaxquant.qarray import QArray, dequantize
from jaxquant.rules import ATTENTION

Operation = DotGeneral | ConvGeneralDilated

# The methods as interceptors see them.  A class that a lifted transform has made has methods of its own,
# within which these are called, so that a call is found once and where its variables are a single layer's.
_KINDS = {
    inspect.unwrap(method): kind
    for method, kind in (
        (nn.Dense.__call__, "linear"),
        (nn.DenseGeneral.__call__, "linear"),
        (nn.Einsum.__call__, "einsum"),
        (nn.Conv.__call__, "conv"),
        (nn.ConvTranspose.__call__, "conv_transpose"),
        (nn.Embed.setup, "embed"),
        (nn.Embed.__call__, "embed"),
        (nn.Embed.attend, "embed"),
        (nn.MultiHeadDotProductAttention.__call__, ATTENTION),
    )
}
_LAYERS = (
    (nn.Dense, "linear"),
    (nn.DenseGeneral, "linear"),
    (nn.Einsum, "einsum"),
    (nn.Conv, "conv"),
    (nn.Embed, "embed"),
)
_SLOTS = {"linear": "dot_general", "conv": "conv_general_dilated", ATTENTION: "attention_fn"}
_DEFAULTS = (None, jax.lax.dot_general, jax.lax.conv_general_dilated)
_ATTENTIONS = (nn.dot_product_attention, jax.nn.dot_product_attention)
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Site:
    """A call of a module with matrix products.

    Attributes:
        path: the module's, with slashes.
        kind: of `jaxquant.coverage.Row`, or ``"conv_local"``.
        module: itself, bound to its variables.
        method: the method's name.
    """

    path: str
    kind: str
    module: Any
    method: str

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return "embedding" if self.kind == "embed" else "kernel"

    def stored(self) -> bool:
        """Whether its weight is frozen."""
        return self.kind != ATTENTION and isinstance(self.value(self.weight), QArray)

    def value(self, name: str) -> Any:
        """A parameter of the module; None where there is none yet."""
        return nn.meta.unbox(self.module.get_variable("params", name))


def site_of(context: nn.module.InterceptorContext) -> Site | None:
    """What is called, where it is a module that rules know."""
    module = context.module
    kind = _KINDS.get(getattr(context.orig_method, "func", None))
    if kind == "conv" and isinstance(module, nn.ConvLocal):
        kind = "conv_local"
    if kind is None and _has_attention(module) and context.method_name != "setup":
        kind = ATTENTION
    if kind is None or module.scope is None:
        return None
    return Site("/".join(module.path), kind, module, context.method_name)


def overridden(context: nn.module.InterceptorContext) -> str | None:
    """The kind of layer of which a method that is called is a subclass's own; None of all others."""
    if context.method_name not in ("__call__", "attend"):
        return None
    for layer, kind in _LAYERS:
        if isinstance(context.module, layer) and hasattr(layer, context.method_name):
            return kind
    return None


def _has_attention(module: nn.Module) -> bool:
    fields = {field.name for field in dataclasses.fields(module)}
    return "attention_fn" in fields and callable(module.attention_fn)  # pyright: ignore


def check_slot(site: Site) -> None:
    """Raises a ValueError where a module has no place for a quantized operation, or one of the user's own."""
    module = site.module
    if site.kind in ("conv_transpose", "conv_local"):
        raise ValueError(
            f"{site.path} is a {type(module).__name__}, which has no place for a quantized product; "
            f"a rule ('{site.path}', None) before the others leaves it in float"
        )
    for name in _own_operations(site):
        raise ValueError(
            f"{site.path} has a {name} of its own, {getattr(module, name)!r}, which a rule would "
            f"replace; a rule ('{site.path}', None) before the others keeps it"
        )


def _own_operations(site: Site) -> Iterator[str]:
    slot = _SLOTS.get(site.kind)
    if slot is None:
        return
    value = getattr(site.module, slot)
    if site.kind == ATTENTION:
        others = ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls")
        is_own = not isinstance(value, Attention) and value not in _ATTENTIONS
    else:
        others = (f"{slot}_cls",)
        is_own = value not in _DEFAULTS
    if is_own:
        yield slot
    yield from (name for name in others if getattr(site.module, name, None) is not None)


# ---------------------------------------------------------------------------------------------------
# Calls


@dataclasses.dataclass(frozen=True)
class Use:
    """A product about to be computed.

    Attributes:
        site: whose.
        operation: what computes it.
        lhs: the activations; None for rows of a table.
        rhs: the weight.
        axes: what the product sums over in lhs and in rhs.
    """

    site: Site
    operation: Operation
    lhs: Any
    rhs: Any
    axes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Product:
    """A site's operation, whose refusals name the site.

    Attributes:
        site: whose.
        operation: what computes it.
        label: what it is, in words.
        watch: sees every use, and gives its activations on.
    """

    site: Site
    operation: Operation
    label: str
    watch: Callable[[Use], Any]

    def __call__(self, lhs: Any, rhs: Any, *args: Any, **options: Any) -> jax.Array:
        with self.named():
            return self.compute(lhs, rhs, *args, **options)

    def compute(self, lhs: Any, rhs: Any, *args: Any, **options: Any) -> jax.Array:
        """The product, in the signature of its lax's own."""
        if self.site.kind == "conv":
            axes = tuple(range(1, lhs.ndim)), tuple(range(rhs.ndim - 1))
        else:
            axes = tuple(args[0][0][0]), tuple(args[0][0][1])
        lhs = self.watch(Use(self.site, self.operation, lhs, rhs, axes))
        return self.operation(lhs, rhs, *args, **options)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Within it a refusal becomes one that names the site."""
        path = self.site.path
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"{path} cannot take {self.label}: {error}; a rule ('{path}', None) before the others "
                "leaves it in float"
            ) from None


def call_with(
    product: Product, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """A site's method with a quantized product in the place of its own.

    Args:
        product: what its weight is multiplied by.
        call: the method.
        args, options: its arguments.
    """
    site = product.site
    if site.kind == "einsum":
        return _einsum(product, call, *args, **options)
    if site.method == "attend":
        return _attend(product, *args, **options)
    if site.kind == "embed" and site.method != "setup":
        return _look_up(product, *args, **options)
    changes: dict[str, Any] = {_SLOTS[site.kind]: product} if site.kind in _SLOTS else {}
    if site.stored():
        changes["param"] = functools.partial(_stored_param, site)
        changes["promote_dtype"] = _keep_stored(site.module.promote_dtype)
        if hasattr(site.module, "mask"):
            changes["mask"] = None  # the stored weight is masked
    with attributes(site.module, **changes):
        return call(*args, **options)


@contextlib.contextmanager
def attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Within it a bound module, which only this one call of the model knows, has other attributes."""
    before = {name: vars(module).get(name, _MISSING) for name in values}
    try:
        for name, value in values.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                del vars(module)[name]
            else:
                object.__setattr__(module, name, value)


def _stored_param(site: Site, name: str, init: Any, shape: Any, *args: Any, **options: Any) -> Any:
    """`nn.Module.param`, which knows the shapes of arrays alone."""
    if name != site.weight:
        return type(site.module).param(site.module, name, init, shape, *args, **options)
    stored = site.value(name)
    if stored.shape != tuple(shape):
        raise ValueError(f"{site.path} has a stored weight {stored.shape}, not {tuple(shape)}")
    return stored


def _keep_stored(promote_dtype: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's promote_dtype that passes stored weights on, in the type they would be promoted to."""

    def keep(*operands: Any, **options: Any) -> list[Any]:
        # In the place of a stored weight its type alone takes part.
        arrays = [jnp.zeros((), x.dtype) if isinstance(x, QArray) else x for x in operands]
        promoted = promote_dtype(*arrays, **options)
        return [
            dataclasses.replace(x, dtype=p.dtype) if isinstance(x, QArray) else p
            for x, p in zip(operands, promoted, strict=True)
        ]

    return keep


def _einsum(
    product: Product, call: Callable[..., Any], inputs: jax.Array, einsum_str: str | None = None
) -> jax.Array:
    """`nn.Einsum`, which has no place for a product."""
    site, module = product.site, product.site.module
    if site.value("kernel") is None:
        call(inputs, einsum_str)  # makes the parameters
    subscripts = nn.merge_param("einsum_str", module.einsum_str, einsum_str).replace(" ", "")
    bias = site.value("bias") if module.use_bias else None
    inputs, kernel, bias = _keep_stored(module.promote_dtype)(
        inputs, site.value("kernel"), bias, dtype=module.dtype
    )
    options = (module.precision, module.preferred_element_type)
    with product.named():
        y = einsum(subscripts, inputs, kernel, product.compute, *options)
    if bias is None:
        return y
    operands, out = subscripts.split("->")
    hidden = "0123456789"[: y.ndim - len(out.replace("...", ""))]  # an ellipsis' axes
    right, out = (term.replace("...", hidden) for term in (operands.split(",")[1], out))
    sizes = zip(out, y.shape, strict=True)
    return y + bias.reshape([n if label in right else 1 for label, n in sizes])


def _look_up(product: Product, inputs: jax.Array) -> jax.Array:
    """Rows of the table as it is stored, as `nn.Embed`; they are summed over their features."""
    module = product.site.module
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError(f"an Embed takes integers; got {inputs.dtype}")
    (table,) = _keep_stored(module.promote_dtype)(
        module.embedding, dtype=module.dtype, inexact=False
    )
    if module.num_embeddings == 1:
        inputs = jnp.zeros_like(inputs)  # as there, one row is everyone's
    product.watch(Use(product.site, product.operation, None, table, ((), (1,))))
    if not isinstance(table, QArray):
        with product.named():
            table = simulate(table, product.operation.forward.rhs, (1,))
        return materialized(rows_of(table, inputs))
    rows, n = dequantize(table[inputs]), table.shape[0]
    place = inputs.astype(jnp.int32)
    is_there = (place >= -n) & (place < n)  # jnp.take gives NaN elsewhere
    return materialized(jnp.where(is_there[..., None], rows, jnp.nan))


def _attend(product: Product, query: jax.Array) -> jax.Array:
    """query · tableᵀ, as `nn.Embed`."""
    module = product.site.module
    query, table = _keep_stored(module.promote_dtype)(query, module.embedding, dtype=module.dtype)
    return product(query, table, (((query.ndim - 1,), (1,)), ((), ())))
