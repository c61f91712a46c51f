"""Every transformation of optax and optax.contrib, each made with settings that suit one small task.

What optax has and this file has not, a test names.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxquant.optim import Policy, quantize_state

# Functions of optax that say nothing of what they return, which is no transformation.
OTHERS = (
    "bias_correction matrix_inverse_pth_root microbatch sigmoid_binary_cross_entropy "
    "update_infinity_moment update_moment update_moment_per_elem_norm schedule_free_eval_params"
)


def public() -> list[str]:
    """The names of optax's functions that make transformations, or do not say what they make."""
    found = ["MultiSteps"]
    for module in (optax, contrib):
        for name, value in vars(module).items():
            if name.startswith("_") or inspect.ismodule(value) or inspect.isclass(value):
                continue
            if not callable(value) or not name[0].islower():
                continue
            returned = inspect.signature(value).return_annotation
            if returned is inspect.Signature.empty or "Transformation" in str(returned):
                found.append(name)
    return sorted(set(found) - set(OTHERS.split()))


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformation, and how it is trained.

    Attributes:
        tx: the transformation.
        extra: what its update is given by name, of "value", "grad", "value_fn", "obj_fn" and "grad_fn".
        pairs: whether it takes lookahead's pairs of parameters.
    """

    tx: Any
    extra: tuple[str, ...] = ()
    pairs: bool = False


def _mask(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _labels(params: Any) -> Any:
    return jax.tree.map(lambda p: "a" if p.ndim > 1 else "b", params)


def _find(name: str) -> Any:
    # Not by getattr: old names of optax's are still answered for, with a warning.
    return (vars(optax) | vars(contrib))[name]


def _scaled(name: str, rate: float, *arguments: Any, **settings: Any) -> Callable[[], Case]:
    """A transformation of gradients, with a learning rate behind it."""
    return lambda: Case(
        optax.chain(_find(name)(*arguments, **settings), optax.scale_by_learning_rate(rate))
    )


def _plain(
    name: str, *arguments: Any, extra: tuple[str, ...] = (), **settings: Any
) -> Callable[[], Case]:
    return lambda: Case(_find(name)(*arguments, **settings), extra)


SEARCH = ("value", "grad", "value_fn")
_RATES = {
    1e-2: "adabelief adam adamax adamaxw adamw amsgrad nadam nadamw radam yogi lamb optimistic_adam_v2 "
    "acprop adopt ademamix sophia galore simplified_ademamix",
    3e-3: "adan rmsprop lion sign_sgd",
    3e-2: "adafactor adagrad sm3 novograd muon momo_adam",
    1e-1: "sgd optimistic_gradient_descent noisy_sgd madgrad schedule_free_sgd",
    1e0: "adadelta lars fromage prodigy dadapt_adamw cocob dog dowg momo",
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "adafactor": {"momentum": 0.9, "min_dim_size_to_factor": 64},
    "lars": {"momentum": 0.9},
    "sgd": {"momentum": 0.9},
    "noisy_sgd": {"seed": 0},
    "galore": {"rank": 16, "update_proj_gap": 50},
    "momo": {"extra": ("value",)},
    "momo_adam": {"extra": ("value",)},
    "sophia": {"extra": ("obj_fn",)},
    "simplified_ademamix": {"alpha": 0.0},
}
OPTIMIZERS: dict[str, Callable[[], Case]] = {
    name: _plain(name, rate, **_SETTINGS.get(name, {}))
    for rate, names in _RATES.items()
    for name in names.split()
} | {
    "signum": _plain("signum", 3e-3),
    "rprop": _plain("rprop", 1e-3),
    "fromage": _plain("fromage", 1e-2),
    "optimistic_adam": _plain("optimistic_adam", 1e-2),
    "polyak_sgd": _plain("polyak_sgd", 1.0, extra=("value",)),
    "lbfgs": _plain("lbfgs", extra=SEARCH),
    "schedule_free_adamw": _plain("schedule_free_adamw", 1e-2),
    "dpsgd": _plain("dpsgd", 1e-1, 1.0, 0.1, 0, 0.9),
    "MultiSteps": lambda: Case(optax.MultiSteps(optax.adam(1e-2), 2)),
}
_ADAM = functools.partial(optax.adam, 1e-2)
PARTS: dict[str, Callable[[], Case]] = {
    "add_decayed_weights": _scaled("add_decayed_weights", 1e-1, 1e-4),
    "add_noise": _scaled("add_noise", 1e-1, 0.01, 0.55, seed=0),
    "adaptive_grad_clip": _scaled("adaptive_grad_clip", 1e-1, 0.1),
    "apply_every": lambda: Case(optax.chain(_ADAM(), optax.apply_every(2))),
    "centralize": _scaled("centralize", 1e-1),
    "clip": _scaled("clip", 1e-1, 1.0),
    "clip_by_block_rms": _scaled("clip_by_block_rms", 1e-1, 1.0),
    "clip_by_global_norm": _scaled("clip_by_global_norm", 1e-1, 1.0),
    "differentially_private_aggregate": _plain("differentially_private_aggregate", 1.0, 0.1, 0),
    "ema": _scaled("ema", 1e-1, 0.9),
    "freeze": lambda: Case(optax.freeze(True)),
    "hutchinson_estimator_diag_hessian": _plain("hutchinson_estimator_diag_hessian"),
    "identity": _scaled("identity", 1e-1),
    "keep_params_nonnegative": lambda: Case(
        optax.chain(optax.sgd(1e-1), optax.keep_params_nonnegative())
    ),
    "measure_with_ema": _plain("measure_with_ema", lambda updates: updates, 0.9),
    "monitor": lambda: Case(optax.chain(optax.monitor({"norm": optax.global_norm}), _ADAM())),
    "normalize": _scaled("normalize", 1e-1),
    "normalize_by_update_norm": _scaled("normalize_by_update_norm", 1e-1),
    "reduce_on_plateau": lambda: Case(
        optax.chain(_ADAM(), contrib.reduce_on_plateau()), ("value",)
    ),
    "scale": _plain("scale", -0.1),
    "scale_by_acprop": _scaled("scale_by_acprop", 1e-2),
    "scale_by_adadelta": _scaled("scale_by_adadelta", 1.0),
    "scale_by_adam": _scaled("scale_by_adam", 1e-2),
    "scale_by_adamax": _scaled("scale_by_adamax", 1e-2),
    "scale_by_adan": _scaled("scale_by_adan", 3e-3),
    "scale_by_ademamix": _scaled("scale_by_ademamix", 1e-2),
    "scale_by_adopt": _scaled("scale_by_adopt", 1e-2),
    "scale_by_amsgrad": _scaled("scale_by_amsgrad", 1e-2),
    "scale_by_backtracking_linesearch": lambda: Case(
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)), SEARCH
    ),
    "scale_by_belief": _scaled("scale_by_belief", 1e-2),
    "scale_by_cocob": _plain("scale_by_cocob"),
    "scale_by_distance_over_gradients": _scaled("scale_by_distance_over_gradients", 1.0),
    "scale_by_factored_rms": _scaled("scale_by_factored_rms", 1e-2, min_dim_size_to_factor=64),
    "scale_by_galore": _scaled("scale_by_galore", 1e-2, rank=16, update_proj_gap=50),
    "scale_by_lbfgs": _scaled("scale_by_lbfgs", 1e-1),
    "scale_by_learning_rate": _plain("scale_by_learning_rate", 1e-1),
    "scale_by_lion": _scaled("scale_by_lion", 3e-3),
    "scale_by_madgrad": lambda: Case(contrib.scale_by_madgrad(1e-1)),
    "scale_by_muon": _scaled("scale_by_muon", 1e-2),
    "scale_by_novograd": _scaled("scale_by_novograd", 3e-2),
    "scale_by_optimistic_gradient": _scaled("scale_by_optimistic_gradient", 1e-1),
    "scale_by_param_block_norm": _scaled("scale_by_param_block_norm", 1e-2),
    "scale_by_param_block_rms": _scaled("scale_by_param_block_rms", 1e-1),
    "scale_by_polyak": lambda: Case(
        optax.chain(optax.scale_by_polyak(), optax.scale(-1.0)), ("value",)
    ),
    "scale_by_radam": _scaled("scale_by_radam", 1e-2),
    "scale_by_rms": _scaled("scale_by_rms", 3e-3),
    "scale_by_rprop": _scaled("scale_by_rprop", 1.0, 1e-3),
    "scale_by_rss": _scaled("scale_by_rss", 3e-2),
    "scale_by_schedule": _plain("scale_by_schedule", lambda count: -0.1),
    "scale_by_sign": _scaled("scale_by_sign", 3e-3),
    "scale_by_simplified_ademamix": _scaled("scale_by_simplified_ademamix", 1e-2, alpha=0.0),
    "scale_by_sm3": _scaled("scale_by_sm3", 3e-2),
    "scale_by_stddev": _scaled("scale_by_stddev", 3e-3),
    "scale_by_trust_ratio": _scaled("scale_by_trust_ratio", 1e-1),
    "scale_by_yogi": _scaled("scale_by_yogi", 1e-2),
    "scale_by_zoom_linesearch": lambda: Case(
        optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(15)), SEARCH
    ),
    "set_to_zero": _plain("set_to_zero"),
    "snapshot": _plain("snapshot", "x", lambda updates: updates),
    "stateless": _plain("stateless", lambda u, p: jax.tree.map(lambda x: -0.1 * x, u)),
    "stateless_with_tree_map": _plain("stateless_with_tree_map", lambda u, p: -0.1 * u),
    "trace": _scaled("trace", 1e-1, 0.9),
    "zero_nans": _scaled("zero_nans", 1e-1),
}
# Wrappers of another transformation; each with its state within ours, and with ours within it.
WRAPPERS: dict[str, Callable[[Any], Case]] = {
    "MultiSteps": lambda tx: Case(optax.MultiSteps(tx, 2).gradient_transformation()),
    "apply_if_finite": lambda tx: Case(optax.apply_if_finite(tx, 3)),
    "chain": lambda tx: Case(optax.chain(optax.clip_by_global_norm(1.0), tx)),
    "conditionally_mask": lambda tx: Case(
        optax.conditionally_mask(tx, lambda step, **_: jnp.asarray(step) % 2 == 0)
    ),
    "conditionally_transform": lambda tx: Case(
        optax.conditionally_transform(tx, lambda step, **_: jnp.asarray(step) >= 0)
    ),
    "flatten": lambda tx: Case(optax.flatten(tx)),
    "inject_hyperparams": lambda tx: Case(
        optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(rate=1.0)
    ),
    "inject_stateful_hyperparams": lambda tx: Case(
        optax.inject_stateful_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(rate=1.0)
    ),
    "lookahead": lambda tx: Case(optax.lookahead(tx, 5, 0.5), pairs=True),
    "masked": lambda tx: Case(optax.masked(tx, _mask)),
    "mechanize": lambda tx: Case(contrib.mechanize(tx)),
    "multi_transform": lambda tx: Case(
        optax.multi_transform({"a": tx, "b": optax.sgd(1e-1)}, _labels)
    ),
    "named_chain": lambda tx: Case(optax.named_chain(("first", tx), ("second", optax.identity()))),
    "partition": lambda tx: Case(optax.partition({"a": tx, "b": optax.sgd(1e-1)}, _labels)),
    "sam": lambda tx: Case(contrib.sam(tx, optax.sgd(1e-2), opaque_mode=True), ("grad_fn",)),
    "schedule_free": lambda tx: Case(contrib.schedule_free(tx, 1e-2, b1=0.9)),
    "selective_transform": lambda tx: Case(optax.selective_transform(tx, freeze_mask=False)),
    "split_real_and_imaginary": lambda tx: Case(contrib.split_real_and_imaginary(tx)),
    "with_extra_args_support": lambda tx: Case(optax.with_extra_args_support(tx)),
}


def has(name: str) -> bool:
    """Whether this version of optax has it."""
    return name in vars(optax) | vars(contrib)


def cases() -> dict[str, Callable[[Policy | None], Case]]:
    """By name, what makes a case under a policy, or in full precision."""

    def direct(make: Callable[[], Case], policy: Policy | None) -> Case:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is deprecated is to work as long as it is there
            case = make()
        if policy is None:
            return case
        return dataclasses.replace(case, tx=quantize_state(case.tx, policy))

    def around(wrap: Callable[[Any], Case], policy: Policy | None) -> Case:
        tx = _ADAM() if policy is None else quantize_state(_ADAM(), policy)
        return direct(lambda: wrap(tx), None)

    found = {n: functools.partial(direct, f) for n, f in (OPTIMIZERS | PARTS).items() if has(n)}
    for name, wrap in WRAPPERS.items():
        if has(name):
            own = functools.partial(wrap, _ADAM())
            found[f"{name}(adam)"] = functools.partial(direct, own)
            found[f"{name}, around"] = functools.partial(around, wrap)
    return found
