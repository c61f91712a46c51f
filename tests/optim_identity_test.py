"""A saved state is known by shapes, codecs and widths, whatever classes, fields and sentences are called."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from jaxquant.artifacts import checksums, folders
from jaxquant.optim import (
    Companded,
    LayerStatistics,
    Leaf,
    Logarithmic,
    UpdateSensitivity,
    adaptive,
    by_role,
    fixed,
    load,
    quantize_state,
    save,
    uniform,
)
from jaxquant.optim.identity import from_version_3, identity
from jaxquant.optim.leaves import Exact
from jaxquant.optim.plans import Plan

pytestmark = pytest.mark.exhaustive  # looks at our files alone

# What `repr` gave of the plans of `CASES` when files of version 3 were written.
PLANS = json.loads((Path(__file__).parent / "optimizer_states_version_3.json").read_text())
PARAMS = {"w": jnp.ones((128, 100)), "b": jnp.zeros(5)}
QUOTED = {"w": jnp.ones((64, 100), jnp.bfloat16), "it's": jnp.zeros(200)}


@pytest.fixture(autouse=True)
def _as_optax_computes():
    """optax's own transformations promote types and ranks."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@dataclasses.dataclass(frozen=True)
class Odd(Companded):
    """Somebody's codec, with a field whose repr is no expression."""

    kept: Any = jnp.bfloat16


ROLES: Any = {"embedding": 8, "head": 8, "matrix": (5, 3), "vector": None}
CASES: dict[str, Any] = {
    "adam": (optax.adam(1e-2), fixed(5, 4), PARAMS, {}),
    "adamw_adaptive": (optax.adamw(1e-2), adaptive(6.0, interval=2), PARAMS, {}),
    "role_bf16": (optax.adamw(1e-2), by_role(ROLES), QUOTED, {}),
    "custom": (
        optax.sgd(1e-2, momentum=0.9),
        fixed(4),
        PARAMS,
        {"codec": lambda leaf: Odd()},
    ),
}


def fresh(name) -> Any:
    tx, policy, params, options = CASES[name]
    return quantize_state(tx, policy, **options).init(params)


def filled(name) -> Any:
    """The state with other numbers in it, its tables as they are."""
    rng, state = np.random.default_rng(0), fresh(name)

    def numbers(x):
        return jnp.asarray(rng.integers(0, 200, x.shape)).astype(x.dtype)

    return jax.tree.map(numbers, state)._replace(tables=state.tables)


def save_version_3(folder, state, plan):
    """A folder as version 3 wrote it, whose plan is a text, and whose exact leaves had numbers alone."""
    folder.mkdir()
    exact = tuple(jax.tree.leaves(state.exact))
    parts = [("tables", state.tables), ("scales", state.scales), ("exact", exact)]
    parts = [("step", state.step), ("pool", state.pool), *parts, ("memory", state.memory)]
    arrays = {
        f".{part}{jax.tree_util.keystr(keys)}": x
        for part, tree in parts
        for keys, x in jax.tree.leaves_with_path(tree)
    }
    stored = {name: folders.as_stored(x) for name, x in arrays.items()}
    safetensors.numpy.save_file(stored, folder / "arrays.safetensors")
    body = {
        "plan": plan,
        "arrays": {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()},
        "files": checksums.digests(folder),
    }
    (folder / "state.json").write_text(checksums.with_checksum("jaxquant optimizer state", 3, body))


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


@pytest.fixture
def renamed(monkeypatch):
    """What `repr` says of a plan's parts is something else each time from now on."""

    def rename():
        for kind in (Plan, Leaf, Exact, Companded, Logarithmic, UpdateSensitivity, LayerStatistics):
            monkeypatch.setattr(kind, "__repr__", lambda self: f"Other{id(self)}")

    return rename


@pytest.mark.parametrize("name", CASES)
def test_states_of_version_3_are_loaded_whatever_has_been_renamed(tmp_path, renamed, name):
    state = filled(name)
    save_version_3(tmp_path / "old", state, PLANS[name])
    if name != "custom":  # whose repr is its author's
        renamed()
    found = load(tmp_path / "old", fresh(name))
    assert equal(found, state)
    assert not equal(found, fresh(name))
    save(tmp_path / "new", found)
    assert json.loads((tmp_path / "new/state.json").read_text())["version"] == 4
    assert equal(load(tmp_path / "new", fresh(name)), state)


@pytest.mark.parametrize("name", CASES)
def test_texts_of_version_3_are_of_these_plans(name):
    assert from_version_3(PLANS[name]) == identity(fresh(name).plan)


@pytest.mark.parametrize("name", ["adam", "adamw_adaptive", "role_bf16"])
def test_renaming_and_rewording_change_no_file(tmp_path, renamed, name):
    state = filled(name)
    save(tmp_path / "state", state)
    like = fresh(name)
    exact = tuple(dataclasses.replace(e, reason=f"{e.reason}, so to say") for e in like.plan.exact)
    reworded = like._replace(plan=dataclasses.replace(like.plan, policy="other", exact=exact))
    assert equal(load(tmp_path / "state", reworded), state)
    renamed()
    assert equal(load(tmp_path / "state", like), state)
    save(tmp_path / "again", state)
    assert (tmp_path / "again/state.json").read_bytes() == (
        tmp_path / "state/state.json"
    ).read_bytes()


def other(tx, policy, params=None, **options) -> Any:
    return quantize_state(tx, policy, **options).init(PARAMS if params is None else params)


FEWER = Logarithmic(13)
LIKE: dict[str, Any] = {
    "bits": ("adam", lambda: other(optax.adam(1e-2), fixed(4, 5)), "runs/0/slots/0/bits/0 is 5 in"),
    "codec": (
        "adam",
        lambda: other(
            optax.adam(1e-2), fixed(5, 4), codec=lambda x: Companded() if x.is_signed else FEWER
        ),
        "codec/range is 14 in it and 13 here",
    ),
    "kind of codec": (
        "custom",
        lambda: other(optax.sgd(1e-2, momentum=0.9), fixed(4)),
        "runs/0/slots/0/codec is .*Odd.* in it and .*companded",
    ),
    "path": (
        "adam",
        lambda: other(optax.adam(1e-2), fixed(5, 4), {"v": PARAMS["w"], "b": PARAMS["b"]}),
        "path is 'w' in it and 'v' here",
    ),
    "slot": (
        "adam",
        lambda: other(optax.chain(optax.identity(), optax.adam(1e-2)), fixed(5, 4)),
        "slot is '0/mu' in it and '1/0/mu' here",
    ),
    "shape": (
        "adam",
        lambda: other(optax.adam(1e-2), fixed(5, 4), PARAMS | {"w": jnp.ones((100, 128))}),
        "shape/0 is 128 in it and 100 here",
    ),
    "interval": (
        "adamw_adaptive",
        lambda: other(optax.adamw(1e-2), adaptive(6.0, interval=3)),
        "adaptation/interval is 2 in it and 3 here",
    ),
    "score": (
        "adamw_adaptive",
        lambda: other(
            optax.adamw(1e-2), adaptive(6.0, interval=2, score=UpdateSensitivity("loss"))
        ),
        "score/weight is 'update' in it and 'loss' here",
    ),
}


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize(("name", "like", "words"), LIKE.values(), ids=LIKE)
def test_what_is_another_state_is_refused_and_said(tmp_path, version, name, like, words):
    state = fresh(name)
    if version == 4:
        save(tmp_path / "state", state)
    else:
        save_version_3(tmp_path / "state", state, PLANS[name])
    with pytest.raises(ValueError, match=f"another transformation, policy .*: .*{words}"):
        load(tmp_path / "state", like())


def test_budgets_and_scores_that_hold_other_arrays_are_refused(tmp_path):
    save(tmp_path / "state", fresh("adamw_adaptive"))
    for policy in (uniform(6.0), adaptive(6.0, interval=2, score=LayerStatistics()), adaptive(5.0)):
        with pytest.raises(ValueError, match="the state to load into has it"):
            load(tmp_path / "state", other(optax.adamw(1e-2), policy))


TEXT = PLANS["adam"]


@pytest.mark.parametrize(
    "plan",
    [
        TEXT[:-5],
        TEXT.replace("runs=", "rows_of="),
        TEXT.replace("codecs=((", "codecs=(("[:-1]),
        "(" * 100_000 + ")" * 100_000,
        "Plan(" * 3000 + ")" * 3000,
        "Plan()",
        "",
        "__import__('os').abort()",
        None,
        {"runs": []},
    ],
)
def test_a_damaged_plan_of_version_3_is_refused(tmp_path, plan):
    save_version_3(tmp_path / "state", fresh("adam"), plan)
    with pytest.raises(ValueError, match=r"state\.json"):
        load(tmp_path / "state", fresh("adam"))


def test_a_head_that_lacks_a_part_is_refused(tmp_path):
    save(tmp_path / "state", fresh("adam"))
    head = tmp_path / "state/state.json"
    body = json.loads(head.read_text())
    for part in ("state", "arrays"):
        rest = {k: v for k, v in body.items() if k not in (part, "sha256", "kind", "version")}
        head.write_text(checksums.with_checksum("jaxquant optimizer state", 4, rest))
        with pytest.raises(ValueError, match=f"does not say its '{part}'"):
            load(tmp_path / "state", cast(Any, fresh("adam")))
