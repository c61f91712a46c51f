"""Rules applied to a Linen module, and the table of what they do."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.errors import FlaxError

from jaxquant import calibration as calibrations
from jaxquant.attention import Attention
from jaxquant.conv import ConvGeneralDilated
from jaxquant.coverage import Coverage, Row, find_products, tag
from jaxquant.dot import DotGeneral
from jaxquant.linen.sites import (
    Operation,
    Product,
    Site,
    Use,
    attributes,
    call_with,
    check_slot,
    overridden,
    site_of,
)
from jaxquant.linen.weights import Weight, abstractly, at, split, weight_of
from jaxquant.qarray import QArray
from jaxquant.quantizer import Quantizer
from jaxquant.rules import ATTENTION, Rule, Rules, Subject, assign, parse_rules

RANGES = "quantization"  # the collection of calibrated ranges


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A Linen module whose matrix products are quantized by rules; made by `quantize`.

    Frozen and hashable as the module is.  Its parameters are the module's own, name by name, so either serves
    with the variables of the other; its methods are those of `flax.linen.Module`, with all their arguments.

    Attributes:
        module: the module, unchanged.
        rules: pairs from regular expressions to recipes.

    Raises:
        ValueError: at the first `init` or `apply`, from where modules are known: a rule that nothing takes;
            a module that cannot take its recipe, or has an operation of the user's own.
    """

    module: nn.Module
    rules: tuple[tuple[Any, Any], ...]

    def init(self, rngs: Any, *args: Any, **options: Any) -> Any:
        """The module's variables, as `flax.linen.Module.init`."""
        return self.call(self.module.init, {}, rngs, *args, **options)

    def init_with_output(self, rngs: Any, *args: Any, **options: Any) -> Any:
        """(output, variables), as `flax.linen.Module.init_with_output`."""
        return self.call(self.module.init_with_output, {}, rngs, *args, **options)

    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        """The module's output, as `flax.linen.Module.apply`; variables may be those of `freeze`."""
        return self.call(self.module.apply, variables, variables, *args, **options)

    def tabulate(self, rngs: Any, *args: Any, **options: Any) -> str:
        """The module's table of its own, as `flax.linen.Module.tabulate`; see `coverage` for ours."""
        return self.call(self.module.tabulate, {}, rngs, *args, **options)

    def call(
        self,
        function: Callable[..., Any],
        variables: Any,
        *args: Any,
        watch: Callable[[Use], Any] = lambda use: use.lhs,
        **options: Any,
    ) -> Any:
        """A function of the module, with its products quantized.

        Args:
            function: such as ``module.apply``.
            variables: the module's, as far as they are known; ranges are taken from them.
            args, options: of the function.
            watch: sees every product, and gives its activations on.
        """
        interceptor = _Interceptor(self.rules, variables.get(RANGES, {}), watch)
        with nn.intercept_methods(interceptor):
            result = function(*args, **options)
        kinds = interceptor.kinds
        assign({**_not_reached(variables.get("params", {}), kinds), **kinds}, self.rules)
        return result


def quantize(module: nn.Module, rules: Rules) -> Quantized:
    """A module with quantized matrix products; its code and its parameters stay as they are.

    A rule's recipe goes to every `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.Conv` and `nn.Embed` that it
    matches first, by the module's path in the variables; an `Attention` to every module with an
    ``attention_fn``, as `nn.MultiHeadDotProductAttention` and modules of one's own have.  Layers under
    `nn.scan` and `nn.vmap` are quantized each by itself, under the path that they share.

    Args:
        module: a Linen module, not bound.
        rules: as in `jaxquant.rules`: from regular expressions on module paths to recipes; the first
            that matches counts, and None leaves a module as it is.

    Raises:
        ValueError: no Linen module; rules that cannot be read; learned steps (``-lsq``).  What depends on
            the modules within is found at the first call; see `Quantized`.

    >>> quantized = quantize(nn.Dense(8), {".*": "w8a8"})
    >>> variables = quantized.init(jax.random.key(0), jax.numpy.ones((2, 64)))
    >>> quantized.apply(variables, jax.numpy.ones((2, 64))).shape
    (2, 8)
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module is a flax.linen.Module; got {type(module).__name__}")
    if module.scope is not None:
        raise ValueError(f"module is not bound to variables; got a bound {type(module).__name__}")
    for rule in parse_rules(rules):
        forward = rule.value.forward if isinstance(rule.value, DotGeneral) else None
        for quantizer in () if forward is None else (forward.lhs, forward.rhs):
            if quantizer is not None and quantizer.calibration is calibrations.learned:
                raise ValueError(
                    f"rule {rule.pattern.pattern!r} maps to {rule.label}, whose learned steps are parameters "
                    "of an NNX model; Linen models take recipes without them, as 'w4a4' and 'w4a4-quest'"
                )
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    return Quantized(module, tuple((pattern, value) for pattern, value in pairs))


class _Interceptor:
    """Gives each module that is called what its rule says."""

    def __init__(self, rules: Rules, ranges: Any, watch: Callable[[Use], Any]):
        self.rules = parse_rules(rules)
        self.ranges = ranges
        self.watch = watch
        self.kinds: dict[str, str] = {}  # of the modules that were called, by path
        self.reached: list[tuple[str, str]] = []  # paths and methods that came to a product

    def __call__(self, call: Any, args: Any, options: Any, context: Any) -> Any:
        mark(context.module, self)
        site = site_of(context)
        if site is None:
            before = len(self.reached)
            output = call(*args, **options)
            self._check_reached(context, before)
            return output
        if site.method != "setup":
            self.reached.append((site.path, site.method))
        self.kinds[site.path] = site.kind
        rule = next((r for r in self.rules if r.takes(Subject((site.path,), site.kind))), None)
        if rule is None or rule.value is None:
            if site.stored():
                raise ValueError(f"{site.path} is frozen, and no rule quantizes it")
            return call(*args, **options)
        check_slot(site)
        if isinstance(rule.value, Attention):
            with attributes(site.module, attention_fn=rule.value):
                return call(*args, **options)
        return call_with(self._product(site, rule), call, args, options)

    def _check_reached(self, context: Any, before: int) -> None:
        """Raises a ValueError where a method of a user's subclass passed its layer's product by.

        Args:
            context: of the method.
            before: how many products were come to before it.
        """
        module, method, kind = context.module, context.method_name, overridden(context)
        if kind is None or module.scope is None:
            return
        path = "/".join(module.path)
        rule = next((r for r in self.rules if r.takes(Subject((path,), kind))), None)
        if rule is None or rule.value is None:
            return
        if any(path == reached for reached, _ in self.reached[before:]):
            self.reached.append((path, method))  # nn.jit will not show it again
        elif (path, method) not in self.reached:
            raise ValueError(
                f"{path or 'the module'} is a {type(module).__name__}, whose own {method} does not reach the "
                f"layer's product, so that no rule does; have it call super().{method}, or leave the layer "
                f"in float by a rule ('{path}', None) before the others"
            )

    def _product(self, site: Site, rule: Rule) -> Product:
        assert isinstance(rule.value, DotGeneral)
        forward = rule.value.forward
        if site.kind == "embed" and forward.rhs is None:
            raise ValueError(
                f"{site.path} is an Embed, and {rule.label} leaves weights in float; "
                f"a rule ('{site.path}', None) before the others leaves it in float"
            )
        lhs, found = forward.lhs, at(self.ranges, site.path)
        if found is not None and "range" in found and lhs is not None and finds_one_range(lhs):
            value = found["range"]
            fixed = calibrations.Range(tuple(value) if value.ndim else value)
            lhs = dataclasses.replace(lhs, calibration=fixed)
            forward = dataclasses.replace(forward, lhs=lhs)
        if site.stored() and jax.tree.leaves(forward.rhs):
            forward = dataclasses.replace(forward, rhs=None)  # what is stored needs no range
        return Product(site, _operation(site, rule, forward), rule.label, self.watch)


def _operation(site: Site, rule: Rule, forward: Any) -> Operation:
    assert isinstance(rule.value, DotGeneral)
    operation = dataclasses.replace(rule.value, forward=forward)
    if site.kind != "conv":
        return operation
    try:
        return ConvGeneralDilated(operation.forward, operation.dlhs, operation.drhs)
    except ValueError as error:
        raise ValueError(
            f"{site.path} cannot take {rule.label}: {error}; a rule ('{site.path}', None) before the others "
            "leaves it in float"
        ) from None


def finds_one_range(quantizer: Quantizer | None) -> bool:
    """Whether activations have one range for all of them, which is found anew at each call."""
    if quantizer is None or quantizer.granularity != "tensor":
        return False
    return not isinstance(quantizer.calibration, calibrations.Range | calibrations.Step)


def mark(module: nn.Module, token: object) -> None:
    """Has what is called within a module traced again for another interceptor, the token."""
    # nn.jit traces a module again where its scope's flags are others, and knows nothing of interceptors.
    scope = module.scope
    if scope is not None and scope.flags.get("jaxquant") is not token:
        scope.flags = {**scope.flags, "jaxquant": token}  # pyright: ignore


def _not_reached(params: Any, kinds: Mapping[str, str]) -> dict[str, str]:
    """Modules with a weight that were not called, as a decoder's are not when the encoder alone runs."""
    found = {}

    def walk(node: Any, path: tuple[str, ...]) -> tuple[bool, bool]:
        name = "/".join(path)
        parts = [walk(child, (*path, k)) for k, child in node.items() if isinstance(child, Mapping)]
        has_weight = "kernel" in node or "embedding" in node
        called = name in kinds or any(part[0] for part in parts)
        weights = has_weight or any(part[1] for part in parts)
        if has_weight and name not in kinds:
            found[name] = "linear"
        elif weights and not called:
            found[name] = ATTENTION  # which it may be
        return called, weights

    walk(params, ())
    return found


# ---------------------------------------------------------------------------------------------------
# Coverage


def coverage(
    module: nn.Module,
    rules: Rules,
    *inputs: Any,
    variables: Any = None,
    rngs: Any = None,
    **options: Any,
) -> Coverage:
    """What each module of a model gets: a row for every module with matrix products.

    The model is traced, not run.

    Args:
        module: a Linen module.
        rules: what it would be quantized by.
        inputs: arguments of its call, arrays or `jax.ShapeDtypeStruct`s.
        variables: the module's, frozen ones included; those that `init` would make where not given.
        rngs: as of `flax.linen.Module.init`.
        options: further arguments of its call, and ``method``.

    Raises:
        ValueError: as `Quantized`.

    >>> print(coverage(nn.Dense(8), {".*": "w4a16"}, jax.ShapeDtypeStruct((2, 64), "float32")))
    path         kind    shape  rule  recipe  bytes before  after   MACs
    (the model)  linear  64×8   .*    w4a16          2,048    288  1,024
    total                                            2,048    288
    """
    quantized = quantize(module, rules)
    rngs = {"params": jax.random.key(0)} if rngs is None else rngs
    options.pop("mutable", None)
    if variables is None:
        variables = abstractly(module.init, rngs, *inputs, **options)
    variables = nn.meta.unbox(variables)
    floats = jax.tree.map(_as_float, variables, is_leaf=_is_stored)
    options |= {"rngs": rngs if isinstance(rngs, Mapping) else {"params": rngs}, "mutable": True}
    tags = _Tags()
    arrays, merge = split((floats, inputs, options))

    def run(arrays: list[Any]) -> None:
        floats, inputs, options = merge(arrays)
        with nn.intercept_methods(tags):
            module.apply(floats, *inputs, **options)

    macs, others = find_products(run, arrays)
    weights = used_weights(quantized, floats, *inputs, **options)
    known = {**_not_reached(variables.get("params", {}), tags.kinds), **tags.kinds}
    assigned = assign(known, rules)
    rows = [
        _row(path, kind, variables, assigned.get(path), weights.get(path), macs.get(path, 0))
        for path, kind in tags.kinds.items()
    ]
    return Coverage(tuple(rows), others)


def used_weights(
    quantized: Quantized, variables: Any, *inputs: Any, **options: Any
) -> dict[str, Weight]:
    """The quantized weights that a call multiplies by, by path; the call is traced, not run."""
    found: dict[str, Weight] = {}

    def watch(use: Use) -> Any:
        weight = weight_of(use)
        if weight is not None:
            first = found.setdefault(weight.path, weight)
            if first.axes != weight.axes:
                raise ValueError(
                    f"{weight.path} is summed over axes {first.axes} in one call and {weight.axes} in another"
                )
        return use.lhs

    def run(variables: Any, *inputs: Any, **options: Any) -> None:
        apply = quantized.module.apply
        quantized.call(apply, variables, variables, *inputs, watch=watch, **options)

    if not isinstance(variables, Mapping):
        raise ValueError(
            f"variables are what the module's init gives; got {type(variables).__name__}"
        )
    try:
        abstractly(run, variables, *inputs, **options)
    except (TypeError, IndexError, AttributeError, ZeroDivisionError, FlaxError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the variables or inputs do not fit the module: {reason}") from error
    return found


class _Tags:
    """Tags each module's products with its path."""

    def __init__(self):
        self.kinds: dict[str, str] = {}

    def __call__(self, call: Any, args: Any, options: Any, context: Any) -> Any:
        mark(context.module, self)
        site = site_of(context)
        if site is None:
            return call(*args, **options)
        self.kinds[site.path] = site.kind
        if site.kind == ATTENTION:
            function = _tagged(site.path, site.module.attention_fn)
            with attributes(site.module, attention_fn=function):
                return call(*args, **options)
        with tag(site.path):
            return call(*args, **options)


def _tagged(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # attention is given the arguments that its signature has
    def call(*args: Any, **options: Any) -> Any:
        with tag(path):
            return function(*args, **options)

    return call


def _row(
    path: str, kind: str, variables: Any, rule: Rule | None, weight: Weight | None, macs: int
) -> Row:
    shape, before, after = None, 0, 0
    if kind != ATTENTION:
        array = at(variables["params"], path)["embedding" if kind == "embed" else "kernel"]
        shape, before = tuple(array.shape), _nbytes(array)
        after = before
        if weight is not None and not _is_stored(array) and not weight.is_traced:
            after = jax.eval_shape(weight.stored, array).nbytes
    expression = None if rule is None else rule.pattern.pattern
    label = "float" if rule is None else rule.label
    return Row(path, kind, shape, expression, label, before, after, macs)


def _is_stored(x: Any) -> bool:
    return isinstance(x, QArray)


def _as_float(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_stored(x) else x


def _nbytes(array: Any) -> int:
    if _is_stored(array):
        return array.nbytes
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize
