"""Old names of `jaxquant.optim`, which stay for one release with a warning; on disk they stay for good."""

import warnings

import jax.numpy as jnp
import optax
import pytest

import jaxquant as jq
from jaxquant.optim.identity import identity
from jaxquant.optim.policies import Adaptation

SENSITIVITY, STATISTICS = jq.optim.UpdateSensitivity, jq.optim.LayerStatistics
RENAMED = {
    "Felt": "UpdateSensitivity",
    "Statistics": "LayerStatistics",
    "even": "uniform",
    "traffic": "bytes_moved",
    "whole": "explain_full_decode",
}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_the_new_object_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match=rf"jaxquant\.optim\.{old} is now {new}") as found:
        assert getattr(jq.optim, old) is getattr(jq.optim, new)
    assert found[0].filename == __file__
    assert old not in jq.optim.__all__
    assert new in jq.optim.__all__


def test_an_old_name_can_be_imported():
    with pytest.warns(DeprecationWarning, match="even is now uniform"):
        from jaxquant.optim import even
    assert even is jq.optim.uniform


def test_new_names_do_not_warn_and_unknown_names_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(hasattr(jq.optim, name) for name in jq.optim.__all__)
        jq.optim.adaptive(5.0, hysteresis=0.5, score=STATISTICS(ema_decay=0.5, max_bit_change=2))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jq.optim.nothing


KEYWORDS = {
    "adaptive": (lambda **own: jq.optim.adaptive(5.0, **own), "stay", "hysteresis", 0.5),
    "decay": (SENSITIVITY, "memory", "ema_decay", 0.25),
    "change": (SENSITIVITY, "reach", "max_bit_change", 3),
    "statistics' decay": (STATISTICS, "memory", "ema_decay", 0.25),
    "statistics' change": (STATISTICS, "reach", "max_bit_change", 3),
}


def comparable(made):
    return (made.name, made.update) if isinstance(made, jq.optim.Policy) else made


@pytest.mark.parametrize(("make", "old", "new", "value"), KEYWORDS.values(), ids=KEYWORDS)
def test_an_old_keyword_has_the_new_meaning_and_both_are_refused(make, old, new, value):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        found = make(**{old: value})
    assert comparable(found) == comparable(make(**{new: value}))
    assert comparable(found) != comparable(make())
    with pytest.raises(ValueError, match=f"{new} must be given once; got {old} and {new}"):
        make(**{old: value, new: value})


@pytest.mark.parametrize(
    ("value", "old", "new"),
    [
        (SENSITIVITY(), "memory", "ema_decay"),
        (STATISTICS(), "reach", "max_bit_change"),
        (Adaptation(1, SENSITIVITY(), 0.5), "stay", "hysteresis"),
    ],
)
def test_an_old_attribute_is_the_new_one_with_a_warning(value, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}") as found:
        assert getattr(value, old) == getattr(value, new)
    assert found[0].filename == __file__


class Constant:
    """A score of somebody else's, which has `reach` as scores once had."""

    reach = 2

    def init(self, plan):
        return ()

    def __call__(self, traced, state, memory, seed):
        scores = [[jnp.zeros(group.grid) for _ in group.slots] for group in state.plan.groups]
        return scores, memory, jnp.array(True)


@pytest.mark.long
def test_a_score_with_reach_still_decides():
    with pytest.warns(DeprecationWarning, match="reach is now max_bit_change") as found:
        policy = jq.optim.adaptive(5.0, interval=1, score=Constant())
    assert found[0].filename == __file__
    params = {"w": jnp.ones((256, 256))}
    tx = jq.optim.quantize_state(optax.trace(0.9), policy)
    _, state = tx.update(params, tx.init(params), params)
    assert int(state.memory[0]) == 0


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (SENSITIVITY(), {"kind": "felt", "weight": "update", "memory": 0.5, "reach": 8}),
        (STATISTICS(), {"kind": "statistics", "memory": 0.9, "reach": 1}),
    ],
)
def test_files_keep_their_words(score, words):
    policy = jq.optim.adaptive(6.0, interval=2, score=score, hysteresis=0.5)
    state = jq.optim.quantize_state(optax.adam(1e-3), policy).init({"w": jnp.ones((256, 256))})
    found = identity(state.plan)
    assert found["adaptation"] == {"interval": 2, "stay": 0.5, "score": words}
    assert set(found) == {"runs", "exact", "rows", "fills", "adaptation"}
    assert set(found["runs"][0]) == {"shards", "starts", "cuts", "slots"}
