"""Every transformation of optax and optax.contrib with its state in few bits, beside full precision.

    python -m experiments.optimizer_states.optimizers

runs all of them, 300 steps each, or those that are named, and keeps what was seen in results/, of which
`python -m experiments.tables --names=optimizer_states/transformations` makes the table.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.optimizer_states.transformations import OPTIMIZERS, PARTS, Case, cases
from jaxquant.optim import Policy, fixed
from jaxquant.optim.codecs import BLOCK
from jaxquant.optim.plans import Plan

RECORDS = Path(__file__).parent.parent / "results" / "optimizer_states" / "optimizers.json"
STEPS = 300
WIDTHS = {"8 bits": fixed(8), "5 + 4 bits": fixed(5, 4)}

# ---------------------------------------------------------------------------------------------------
# The task


def parameters() -> dict[str, jax.Array]:
    """A matrix of which every element is learned, and a bias below the size that is coded."""
    rng = np.random.default_rng(0)
    return {"w": jnp.array(rng.normal(size=(64, 32)) / 8, jnp.float32), "b": jnp.zeros(32)}


@functools.cache
def _batches(steps: int, noise: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and noisy targets of all steps, alike for all transformations."""
    rng = np.random.default_rng(steps)
    # Inputs of unlike sizes: some directions are learned soon, others late.
    x = rng.normal(size=(steps, size, 64)) * np.geomspace(2.0, 0.2, 64)
    y = np.tanh(x @ np.random.default_rng(1).normal(size=(64, 32)) / 4)
    y += noise * rng.normal(size=y.shape)
    return x.astype(np.float32), y.astype(np.float32)


def _loss(params: Any, batch: Any) -> jax.Array:
    params = params.fast if isinstance(params, optax.LookaheadParams) else params
    return jnp.mean((jnp.tanh(batch[0] @ params["w"] + params["b"]) - batch[1]) ** 2)


def trained(case: Case, steps: int = STEPS) -> tuple[float, float]:
    """(first, last) loss on targets without noise."""
    tx = optax.with_extra_args_support(_transformation(case.tx))
    test = jax.tree.map(lambda x: x[0], _batches(1, 0.0, 1024))

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        value_fn = lambda p: _loss(p, batch)  # noqa: E731
        own = params.fast if isinstance(params, optax.LookaheadParams) else params
        value, grad = jax.value_and_grad(value_fn)(own)
        every = {
            "value": value,
            "grad": grad,
            "value_fn": value_fn,
            "obj_fn": value_fn,
            "grad_fn": lambda p, _: jax.grad(value_fn)(p),
        }
        updates, state = tx.update(grad, state, params, **{k: every[k] for k in case.extra})
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: Any, batches: Any, test: Any) -> tuple[jax.Array, jax.Array]:
        before = _loss(params, test)
        params = optax.LookaheadParams.init_synced(params) if case.pairs else params
        carry = params, tx.init(params)
        (params, _), _ = jax.lax.scan(step, carry, batches)
        return before, _loss(params, test)

    first, last = run(parameters(), _batches(steps, 0.3, 64), test)
    return float(first), float(last)


def _transformation(tx: Any) -> Any:
    return tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx


# What becomes of a state


@dataclasses.dataclass(frozen=True)
class Kind:
    """The slots that are coded, and those that stay exact, with the reason; or a refusal.

    Leaves below the size of a block, and those of no parameter, are not counted.
    """

    coded: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def name(self) -> str:
        return "refused" if self.refusal else "partly coded" if self.exact else "coded"

    @property
    def slots(self) -> str:
        if self.refusal:
            return self.refusal
        coded = ", ".join(f"`{slot}`" for slot in self.coded)
        return coded + (f"; exact: {'; '.join(self.exact)}" if self.exact else "")


def kind_of(make: Callable[[Policy | None], Case]) -> Kind:
    """What `init` says, from shapes alone."""
    params = jax.eval_shape(parameters)
    try:
        case = make(WIDTHS["8 bits"])
        tx = _transformation(case.tx)
        begin = optax.LookaheadParams.init_synced if case.pairs else lambda x: x
        state = jax.eval_shape(lambda p: tx.init(begin(p)), params)
    except ValueError as error:
        return Kind(refusal=str(error).removeprefix("no leaf of the optimizer's state can be "))
    has_plan = lambda x: isinstance(getattr(x, "plan", None), Plan)  # noqa: E731
    plans = [x.plan for x in jax.tree.leaves(state, is_leaf=has_plan) if has_plan(x)]
    exact = {
        f"`{leaf.slot}` ({leaf.reason})": None
        for plan in plans
        for leaf in plan.exact
        if leaf.parameter is not None and math.prod(leaf.shape) >= BLOCK
    }
    coded = {leaf.slot: None for plan in plans for leaf in plan.leaves}
    return Kind(tuple(coded), tuple(exact))


# ---------------------------------------------------------------------------------------------------
# A row


def within(row: Mapping[str, Any]) -> bool:
    """Whether what was run ended within a quarter of optax's loss, and so much of the first besides."""
    shares = {"8 bits": 0.002, "5 + 4 bits": 0.05}
    return all(
        row[name] <= 1.25 * row["plain"] + share * row["first"]
        for name, share in shares.items()
        if isinstance(row.get(name), float)
    )


def described(make: Callable[[Policy | None], Case]) -> dict[str, str]:
    """What is known of a row without a step."""
    kind = kind_of(make)
    return {"kind": kind.name, "slots": kind.slots}


def measured(
    make: Callable[[Policy | None], Case], widths: Mapping[str, Policy] = WIDTHS
) -> dict[str, Any]:
    """A row: losses, where the state is not refused."""
    row: dict[str, Any] = described(make)
    if row["kind"] == "refused":
        return row
    row["first"], row["plain"] = trained(make(None))
    for name, policy in widths.items():
        try:
            row[name] = trained(make(policy))[1]
        except ValueError as error:
            row[name] = f"refused: {error}"
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="transformations to run; all where none is named")
    parser.add_argument("--describe", action="store_true", help="run none; look at states alone")
    given = parser.parse_args(arguments)
    rows = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    known = cases()
    trainable = [name for name in known if name not in PARTS]
    for name in () if given.describe else given.names or trainable:
        # A wrapper changes nothing of what Adam's widths do, which has a row of its own.
        widths = WIDTHS if name in OPTIMIZERS else {"8 bits": fixed(8)}
        rows[name] = measured(known[name], widths)
        print(name, rows[name], flush=True)
        _keep({k: rows[k] for k in known if k in rows})
    if not given.names:
        _keep({k: rows.get(k, {}) | described(make) for k, make in known.items()})


def _keep(rows: Mapping[str, Any]) -> None:
    RECORDS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
