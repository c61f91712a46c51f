"""A run that is monitored: its records, TensorBoard's histograms, the figure, and that it trains the same."""

import json
import struct
import sys
from pathlib import Path

import children
import jax
import numpy as np
import pytest
from flax import nnx

from experiments.harness.models import lm
from experiments.harness.training import sharding
from experiments.train import monitoring, program, run
from experiments.train.program import Config
from experiments.train.watching import Watching

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("library_promotion")


def config(**changes) -> Config:
    small = {
        "size": "3k",
        "scan": True,
        "recipe": "fp8_train",
        "steps": 8,
        "batch": 4,
        "sequence": 32,
        "evaluation_windows": 4,
        "log_every": 4,
        "checkpoint_every": 4,
    }
    return Config(**{**small, **changes})


def histograms(folder) -> dict[tuple[int, str], int]:
    """By step and name, how many numbers TensorBoard has."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + length])
            own = (v for v in event.summary.value if v.HasField("histo"))
            found |= {(event.step, v.tag): int(v.histo.num) for v in own}
            at += length + 16
    return found


@pytest.fixture(scope="module")
def monitored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitored")
    with jax.numpy_dtype_promotion("standard"):
        run(config(monitor_every=2), folder, Watching(("tensorboard",)))
    return folder


@pytest.mark.long
def test_a_monitored_run_has_the_same_bytes(monitored, tmp_path):
    run(config(), tmp_path)
    for name in ("metrics.json", "result.json"):
        assert (tmp_path / name).read_bytes() == (monitored / name).read_bytes()
    assert not (tmp_path / "monitor").exists()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.long
def test_records_of_every_layer_and_step(monitored):
    found = monitoring.records(monitored)
    assert [one["step"] for one in found] == [2, 4, 6, 8]
    for one in found:
        assert len(one["rows"]) == 7 * 2 * 4  # products, layers, roles
        for row in one["rows"]:
            assert row["nonfinite"] == 0
            assert 10 < row["sqnr"] < 60
            assert sum(count for _, count in row["histogram"]) > 0
    table = monitoring.to_table(found)
    assert set(table["layer"]) == {"0", "1"}
    one = table[table["name"] == table["name"][0]].sort_values("step")
    amax = one["amax"].to_numpy()
    assert np.isnan(one["growth"].iloc[0])
    np.testing.assert_allclose(one["growth"][1:], amax[1:] / np.maximum.accumulate(amax)[:-1])


@pytest.mark.long
def test_a_figure_and_tensorboards_histograms(monitored):
    assert (monitored / "figures" / "monitor_sqnr.svg").stat().st_size > 10_000
    page = (monitored / "report.html").read_text()
    for words in ("SQNR, dB", "share saturated", "become zero", "largest magnitude"):
        assert words in page
    found = histograms(monitored)
    assert {step for step, _ in found} == {2, 4, 6, 8}
    name = "monitor/blocks/mlp/up/kernel/1/rhs"
    rows = monitoring.records(monitored)[0]["rows"]
    row = next(r for r in rows if f"monitor/{monitoring.tag(r)}" == name)
    assert found[2, name] == sum(count for _, count in row["histogram"]) == 12 * 32


@pytest.mark.long
def test_a_run_that_goes_on_has_the_records_of_one_that_did_not_stop(monitored, tmp_path):
    run(config(monitor_every=2, checkpoint_every=4), tmp_path)
    for path in (tmp_path / "monitor").iterdir():
        path.unlink()
    (tmp_path / "result.json").unlink()
    import shutil

    newest = max((tmp_path / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    shutil.rmtree(newest)
    run(config(monitor_every=2), tmp_path)
    for name in ("000000006.json", "000000008.json"):
        ours, theirs = (
            json.loads((f / "monitor" / name).read_text()) for f in (tmp_path, monitored)
        )
        assert ours == theirs


@pytest.mark.long
def test_weights_by_hand(monitored):
    """The first record's weights are those of the checkpoint-free start, two steps on: amax of each layer."""
    made = program.make_program(config(), sharding.make_mesh(), 256)
    params = made.init(0)
    found = made.monitor(params, np.zeros((4, 33), np.int32))
    model = lm.LM(made.model, nnx.Rngs(0))
    for kind in ("up", "down"):
        kernel = np.asarray(getattr(model.blocks.mlp, kind).kernel[...])
        np.testing.assert_array_equal(
            found[f"blocks/mlp/{kind}/kernel"].rhs.amax, np.abs(kernel).max((1, 2))
        )


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config.monitor_every=-1",), "config.monitor_every is a whole number of steps"),
        (("--config.monitor_every=2.5",), "monitor_every"),
        (("--config.monitor_every=5", "--config.recipe="), "needs a quantized model"),
    ],
)
def test_bad_input_is_one_line_and_status_two(tmp_path, arguments, words):
    command = [sys.executable, "-m", "experiments.train", "--preset=smoke", f"--workdir={tmp_path}"]
    done = children.run([*command, *arguments], cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
