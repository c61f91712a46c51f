"""Trials of several lengths: what they cost, where branches leave, and data that is another one."""

import dataclasses
import types

import numpy as np
import pytest

from experiments.harness import data, lengths
from experiments.harness.reporting import statistics
from experiments.training_precision import PRESETS


@dataclasses.dataclass(frozen=True)
class Trial(lengths.Trial):
    size: str = "14k"
    tokens_per_parameter: tuple[int, ...] = (10, 30, 90)
    sequence: int = 64
    batch: int = 16


def alone(*tokens_per_parameter: int) -> float:
    return lengths.cost(Trial(tokens_per_parameter=tokens_per_parameter))


def test_a_single_length_costs_its_steps():
    trial = Trial(tokens_per_parameter=(30,))
    assert lengths.cost(trial) == trial.steps(30) * lengths.step_cost(trial)


def test_branches_share_their_trunk():
    """Together they cost more than the longest, and less than each by itself."""
    assert alone(90) < alone(10, 30, 90) < alone(10) + alone(30) + alone(90)
    trial = Trial()
    cooled = [trial.steps(d) - trial.cooldown_start(d) for d in trial.tokens_per_parameter]
    trunk = trial.cooldown_start(90)
    assert lengths.cost(trial) == (trunk + sum(cooled)) * lengths.step_cost(trial)
    assert all(steps >= 1 for steps in cooled)


def test_a_length_that_whole_batches_miss_is_refused():
    lengths.check_lengths(Trial())
    with pytest.raises(ValueError, match="would come out as"):
        lengths.check_lengths(Trial(batch=4096))


SIZES = {"sizes": ("14k", "38k"), "peak_lr": 1e-3, "peak_lrs": (), "size_lrs": ()}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"14k": (1e-3,), "38k": (1e-3,)}),
        ({"peak_lrs": (1, 2)}, {"14k": (1, 2), "38k": (1, 2)}),
        ({"size_lrs": (1, 2)}, {"14k": (1,), "38k": (2,)}),
        ({"size_lrs": ((1, 2), 3)}, {"14k": (1, 2), "38k": (3,)}),
    ],
)
def test_each_size_has_its_rates(given, found):
    assert lengths.rates_by_size(types.SimpleNamespace(**SIZES | given)) == found


@pytest.mark.parametrize("own", [((1, 1), 2), ((), 2), (1,), (1, -2), (1, "x"), ((1, 0), 2)])
def test_rates_that_cannot_be_are_named(own):
    config = dataclasses.replace(PRESETS["tuned"], size_lrs=own)
    with pytest.raises(ValueError, match="size_lrs"):
        lengths.check(config)


def test_another_corpus_is_refused():
    corpus = data.load("generated")
    assert data.unchanged(corpus, corpus.fingerprint, "generated") is corpus
    with pytest.raises(RuntimeError, match="'generated' changed"):
        data.unchanged(corpus, "0" * 16, "generated")


def test_t_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [statistics.t_interval(rng.normal(size=3), 0.9) for _ in range(2000)]
    held = np.mean([low <= 0 <= high for _, low, high in found])
    assert held == pytest.approx(0.9, abs=5 * (0.9 * 0.1 / 2000) ** 0.5)
