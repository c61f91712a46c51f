"""Rules applied to a Linen module, and the table of what they do."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import linen as nn
from flax.errors import FlaxError

from jaxquant.engine.rules import ATTENTION, Rules, Subject, choose, parse_rules
from jaxquant.engine.walking import Trace, as_returned
from jaxquant.functions import quantizing
from jaxquant.functions.coverage import Coverage, table
from jaxquant.functions.quantizing import Decision
from jaxquant.functions.states import State, is_learned
from jaxquant.linen.calls import Call, abstractly, called


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A Linen module whose matrix products are quantized by rules; made by `quantize`.

    Frozen and hashable as the module is.  Its parameters are the module's own, name by name, so either serves
    with the variables of the other; its methods take the arguments of those of `flax.linen.Module`, hashable
    where they are no arrays.  Each is traced, once for each combination of shapes and of other arguments: a
    module's settings count as they were then.

    Attributes:
        module: the module, unchanged.
        rules: pairs from regular expressions to recipes.
        on_unsupported: as of `quantize`.

    Raises:
        ValueError: at the first `init` or `apply`, from where products are known: a rule that no parameter
            or module has a path for; products that cannot take their recipes, all at once.
    """

    module: nn.Module
    rules: tuple[tuple[Any, Any], ...]
    on_unsupported: Literal["error", "float"] = "error"

    def init(self, rngs: Any, *args: Any, **options: Any) -> Any:
        """Returns the module's variables, as `flax.linen.Module.init`."""
        variables = self.module.init(rngs, *args, **options)
        jax.eval_shape(lambda: self._initial(variables, rngs, args, options))  # what is refused
        return variables

    def init_with_output(self, rngs: Any, *args: Any, **options: Any) -> Any:
        """Returns (output, variables), as `flax.linen.Module.init_with_output`."""
        variables = self.module.init(rngs, *args, **options)
        return as_returned(self._initial(variables, rngs, args, options)), variables

    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        """Returns the module's output, as `flax.linen.Module.apply`; variables may be those of `freeze`."""
        return as_returned(self._run(*called(variables, args, options)))

    def tabulate(self, rngs: Any, *args: Any, **options: Any) -> str:
        """Returns the module's table of its own, as `flax.linen.Module.tabulate`; see `coverage` for ours."""
        return self.module.tabulate(rngs, *args, **options)

    def decide(
        self, call: Call, trace: Trace, stored: Any, states: Any, is_tried: bool = False
    ) -> list[Decision]:
        """Decides how each product of a call is computed.

        Args:
            call: of the module.
            trace: its own.
            stored: paths of parameters in few bits.
            states: of parameters, by path.
            is_tried: as of `jaxquant.functions.quantizing.decide`.

        Raises:
            ValueError: a rule that no parameter or module has a path for.
        """
        rules = parse_rules(self.rules)
        check_used(call.weights, trace, rules)
        if not any(product.is_quantizable for product in trace.products):
            return [Decision(product, None) for product in trace.products]
        decisions = quantizing.decide(
            trace.products, rules, True, states, stored, is_tried=is_tried
        )
        if call.is_own:
            quantizing.warn_of_untaken(decisions, rules)
        return decisions

    def _initial(self, variables: Any, rngs: Any, args: tuple, options: dict[str, Any]) -> Any:
        own = {n: x for n, x in options.items() if n not in ("mutable", "capture_intermediates")}
        params = {"params": variables.get("params", {})}
        return self._run(*called(params, (rngs, *args), own, is_initial=True))

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        """The module's call with other products, compiled for each `Call`."""

        @functools.partial(jax.jit, static_argnums=0, inline=True)
        def run(call: Call, states: dict[str, State], arrays: list[Any]) -> Any:
            trace = call.trace(self.module, arrays)
            stored = quantizing.stored_among(call.origins, arrays)
            decisions = self.decide(call, trace, stored, states)
            how = call.origins, self.on_unsupported
            return quantizing.evaluate(trace, decisions, arrays, *how)

        return run

    def __getstate__(self) -> dict[str, Any]:
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields}  # without what is compiled


def quantize(
    module: nn.Module, rules: Rules, *, on_unsupported: Literal["error", "float"] = "error"
) -> Quantized:
    """Returns a module with quantized matrix products; its code and its parameters stay as they are.

    Every product goes by the path of its parameter, whoever wrote the layer, as ``blocks_0/up/kernel``, and
    by that of what holds it, ``blocks_0/up``; it takes a recipe such as ``"w8a8"``.  A product of two
    activations goes by what the parameters nearest above it have in common, as ``blocks_0/attention``, and
    takes one such as ``"a8"``.  Rows that integers take of a table are quantized as the table is.
    Layers under `nn.scan` and `nn.vmap`, stacked along any axis, are quantized each by itself.

    What comes back has `init` and `apply` and is no `flax.linen.Module` itself: quantize the whole model,
    with rules for its parts, rather than a part within another module.

    Args:
        module: a Linen module, not bound.
        rules: as in `jaxquant.engine.rules`: from regular expressions on paths to recipes; the first that
            matches counts, and None leaves a product as it is.
        on_unsupported: what becomes of a product that cannot take its recipe, when it is called: ``"error"``
            names all of them, ``"float"`` leaves them.

    Raises:
        ValueError: no Linen module; rules that cannot be read; learned steps (``-lsq``).  What depends on
            the products is found at the first call; see `Quantized`.

    >>> import jax
    >>> quantized = quantize(nn.Dense(8), {".*": "w8a8"})
    >>> variables = quantized.init(jax.random.key(0), jax.numpy.ones((2, 64)))
    >>> quantized.apply(variables, jax.numpy.ones((2, 64))).shape
    (2, 8)
    """
    if isinstance(module, Quantized):
        raise ValueError(
            "module is quantized already; give its own, quantized.module, with all the rules"
        )
    if not isinstance(module, nn.Module):
        raise ValueError(f"module must be a flax.linen.Module; got {type(module).__name__}")
    if module.scope is not None:
        raise ValueError(f"module must not be bound; got a bound {type(module).__name__}")
    if on_unsupported not in ("error", "float"):
        raise ValueError(f"on_unsupported is 'error' or 'float'; got {on_unsupported!r}")
    for rule in parse_rules(rules):
        forward = getattr(rule.value, "forward", None)
        if forward is not None and (is_learned(forward.lhs) or is_learned(forward.rhs)):
            raise ValueError(
                f"rule {rule.pattern.pattern!r} maps to {rule.label}, whose learned steps are parameters "
                "of an NNX model; Linen models take recipes without them, as 'w4a4' and 'w4a4-quest'"
            )
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    return Quantized(module, tuple((pattern, value) for pattern, value in pairs), on_unsupported)


def check_used(weights: tuple[str, ...], trace: Trace, rules: Any) -> None:
    """Raises a ValueError for a rule that no weight or module of a model has a path for.

    Args:
        weights: paths of all, also of those that this call does not reach.
        trace: of the call.
        rules: as `parse_rules` gave them.
    """
    found = dict.fromkeys(p.path for p in trace.products if p.weight is not None)
    subjects = [Subject(_names(path), "weight") for path in {**dict.fromkeys(weights), **found}]
    reached = {path for product in trace.products for path in product.parameters}
    left = [path.split("/") for path in weights if path not in reached]
    # A module of which this call does not reach all may have products of activations too.
    above = {"/".join(names[:i]) for names in left for i in range(len(names))}
    above |= {product.path for product in trace.products if product.weight is None}
    choose([*subjects, *(Subject((path,), ATTENTION) for path in sorted(above))], rules)


def _names(path: str) -> tuple[str, ...]:
    holder = path.rpartition("/")[0]
    return (path, holder) if holder else (path,)


def coverage(
    module: nn.Module,
    rules: Rules,
    *inputs: Any,
    variables: Any = None,
    rngs: Any = None,
    **options: Any,
) -> Coverage:
    """Returns a table of how each product of a model is computed.

    The model is traced, not run.  A product that cannot take its recipe is a row with the reason.

    Args:
        module: a Linen module.
        rules: what it would be quantized by.
        inputs: arguments of its call, arrays or `jax.ShapeDtypeStruct`s.
        variables: the module's, frozen ones included; those that `init` would make where not given.
        rngs: as of `flax.linen.Module.init`.
        options: further arguments of its call, and ``method``.

    Raises:
        ValueError: as `quantize`; a rule that no parameter or module has a path for; variables or inputs that
            do not fit the module.

    >>> import jax
    >>> print(coverage(nn.Dense(8), {".*": "w4a16"}, jax.ShapeDtypeStruct((2, 64), "float32")))
    100 % of 1,024 MACs are quantized
    path    kind  operands     rule  recipe  bytes before  after   MACs
    kernel  dot   2×64 · 64×8  .*    w4a16          2,048    288  1,024
    total                                           2,048    288
    multiplied with nothing: bias
    """
    quantized = quantize(module, rules, on_unsupported="float")
    if inputs and isinstance(inputs[0], Mapping) and "params" in inputs[0]:
        raise ValueError(
            "inputs are arguments of the module's call; give variables=variables by name"
        )
    rngs = {"params": jax.random.key(0)} if rngs is None else rngs
    options.pop("mutable", None)
    if variables is None:
        variables = abstractly(module.init, rngs, *inputs, **options)
    options |= {"rngs": rngs if isinstance(rngs, Mapping) else {"params": rngs}, "mutable": True}
    if not called(variables, inputs, options)[0].weights:
        raise ValueError("the variables hold no weight under 'params', as those that init gives do")
    decisions, call, arrays = trace_call(quantized, variables, inputs, options)[1:]
    return table(decisions, call.parameters, call.values(arrays))


def trace_call(
    quantized: Quantized, variables: Any, inputs: tuple, options: Mapping[str, Any]
) -> tuple[Trace, list[Decision], Call, list[Any]]:
    """Returns a call's trace, what becomes of its products, the call, and its arrays.

    Raises:
        ValueError: variables or inputs that do not fit the module.
    """
    call, states, arrays = called(variables, inputs, options)
    try:
        trace = call.trace(quantized.module, arrays)
    except (TypeError, IndexError, AttributeError, ZeroDivisionError, FlaxError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the variables or inputs do not fit the module: {reason}") from error
    stored = quantizing.stored_among(call.origins, arrays)
    return trace, quantized.decide(call, trace, stored, states, is_tried=True), call, arrays
