"""Steps compiled for TPUs that are not there, by the binary."""

import importlib.util
import json
import subprocess
import sys

import children
import pytest
from conftest import ROOT

from experiments.harness.models import lm
from experiments.train import PRESETS, aot, aot_table, scaling

pytestmark = pytest.mark.exhaustive
needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
SMALL = ("--config.recipe=int8_train", "--config.state=even-6.0", "--config.vocab_size=256")


def compile_only(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.train", "--preset=smoke", "--compile_only"]
    return children.run([*command, *flags], cwd=ROOT, timeout=500)


@needs_tpu_compiler
def test_a_step_is_compiled_and_said_what_it_takes(tmp_path):
    size = ("--config.size=332k", "--config.batch=32", "--config.scan=True", "--config.remat=True")
    done = compile_only("--topology=v5e:2x2", f"--workdir={tmp_path}", *SMALL, *size)
    assert done.returncode == 0, done.stderr
    for words in (
        "HBM of a device",
        "state / float32's",
        "wgrad",
        "all-gather",
        "says nothing of time",
    ):
        assert words in done.stdout
    record = json.loads((tmp_path / "compiled_v5e_2x2.json").read_text())
    int8 = {x["phase"]: x for x in record["products"] if x["operands"] == ["s8", "s8"]}
    assert set(int8) == {"forward", "recomputed", "dgrad", "wgrad"}
    # Each multiplies each weight of the blocks with each token once; rows may be padded to whole tiles.
    weights = lm.SIZES["332k"].non_embedding_parameters
    least = 2 * weights * 32 * 64 / 4
    for phase in ("dgrad", "wgrad"):
        assert least <= int8[phase]["flops"] <= 1.5 * least
    assert any(x["types"] == "s8" for x in record["collectives"])
    (row,) = scaling.bounds([record]).to_dict("records")
    assert (row["chips"], row["tokens"]) == (4, 32 * 64)
    assert 0 < row["utilization"] <= 1
    assert row["received"] == sum(x["bytes"] for x in record["collectives"])
    assert scaling.figure([record]).to_dict()["mark"]["type"] == "bar"


@needs_tpu_compiler
@pytest.mark.long
def test_a_step_that_does_not_fit_says_by_how_much_and_what_to_change():
    large = ("--config.size=57m", "--config.batch=4096", "--config.sequence=1024")
    done = compile_only("--topology=v5e:2x2", "--config.vocab_size=256", *large)
    assert done.returncode == 1
    assert "too much" in done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: the step does not fit: ")
    for words in ("GiB too much", "--config.remat=True", "or fewer, where activations"):
        assert words in line
    assert "config.state" not in line  # the state is a thousandth of what is too much


def test_advice_goes_by_what_takes_the_memory():
    config = PRESETS["tpu"]
    said = aot._advice(used=40.0, usable=16.0, state=12.0, config=config)
    assert "--config.state=fixed-5" in said
    assert f"--config.batch={config.batch * 16 // 40} or fewer" in said
    assert "3 times as many chips" in said
    assert "state=" not in aot._advice(used=40.0, usable=16.0, state=0.1, config=config)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--topology=v5e:2x2x2",), "v5e has two dimensions"),
        (("--topology=v5e:99",), "--topology is one of TPUs that the compiler knows"),
        ((), "needs a --topology"),
        (("--topology=v5e:2x2", "--config.mesh_fsdp=3"), "does not cover 4 device(s)"),
        (("--topology=v5e:2x2", "--config.batch=3"), "does not divide over 4 devices"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_a_line(flags, words):
    if importlib.util.find_spec("libtpu") is None:
        words = "libtpu" if flags else words
    done = compile_only(*flags, *SMALL)
    assert done.returncode == 2
    assert words in done.stderr.strip().splitlines()[-1]


def test_memory_that_is_not_enough_is_read_from_what_the_compiler_says():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 5.75G."
    )
    found = aot._out_of_memory(said, PRESETS["pod"], 1e9)
    assert (found["used"], found["beyond"]) == (21.5 * 2**30, 5.75 * 2**30)
    assert found["advice"].startswith(
        "the step does not fit: 5.75 GiB too much; try --config.mesh_tensor=2"
    )
    with pytest.raises(RuntimeError, match="something else"):
        aot._out_of_memory("something else", PRESETS["pod"], 1e9)


def test_tables_are_aligned():
    text = aot_table.table(("what", "how much"), [("a", "1.5"), ("longer", "12")])
    assert text.splitlines()[2:] == ["| a      |      1.5 |", "| longer |       12 |"]
