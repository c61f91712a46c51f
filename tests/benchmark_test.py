import concurrent.futures
import dataclasses
import json
import math
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, study_command
from flax import nnx
from scipy import stats

from experiments.benchmark import optimizers, serving, step, study, variants
from experiments.benchmark.lm import LinenLM, NnxLM, Shape
from experiments.harness.running import timing

pytestmark = [pytest.mark.exhaustive, pytest.mark.long]

SHAPE = Shape(layers=1, width=16, heads=2)


def benchmark(workdir, *flags: str) -> subprocess.CompletedProcess:
    command = study_command(workdir, *flags, study="benchmark")
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def _lenient(_strict):
    """JAX's own promotion, under which the binary runs: the peers' and the models' code needs it."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


# ---- the binary under smoke


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The binary under --preset=smoke, peers and all: (folder, process)."""
    for package in variants.PEERS:
        pytest.importorskip(
            package, reason="the peers' extra is not installed: jaxquant[benchmark]"
        )
    workdir = tmp_path_factory.mktemp("benchmark")
    done = benchmark(workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done


@pytest.fixture(scope="module")
def result(finished):
    return json.loads((finished[0] / "benchmark.json").read_text())


def test_every_variant_has_a_ratio_and_a_loss_near_the_baselines(result):
    names = {(row["api"], row["variant"]) for row in result["steps"]}
    assert len(names) == len(result["steps"]) == 8 + 7  # AQT exists for Linen alone
    baseline = {r["api"]: r["loss"] for r in result["steps"] if r["variant"] == variants.BASELINE}
    for row in result["steps"]:
        assert 0 < row["median"] < math.inf
        assert len(row["seconds"]) == result["config"]["rounds"]
        assert row["temporaries"] > 0
        assert row["arguments"] > 0
        # Below the loss of knowing nothing: every variant learns.
        assert row["loss"] < math.log(256)
        assert row["loss"] == pytest.approx(baseline[row["api"]], abs=0.05), row["variant"]


def test_all_variants_quantize_the_same_products(result):
    products = {}
    for row in result["steps"]:
        assert row["deviation"] == "", row["variant"]
        products[row["api"], row["variant"]] = row["products"]["int8_multiply_adds"]
    for rival in result["rivals"]:
        if "simulated" not in rival["ours"]:
            api = rival["api"]
            assert products[api, rival["ours"]] == products[api, rival["peer"]] > 0


def test_every_server_has_a_ratio_and_logits_near_the_baselines(result):
    rows = {(row["part"], row["variant"]): row for row in result["serving"]}
    assert len(rows) == len(result["serving"]) == 6 + 4
    for (part, name), row in rows.items():
        assert row["deviation"] == "", name
        assert 0 < row["median"] < math.inf
        assert len(row["seconds"]) == result["config"]["serve_rounds"]
        # Four bits of an untrained model's weights leave a good part of the logits, and of no other.
        assert row["error"] < (0.5 if "w4" in name else 0.1), name
        assert (row["error"] == 0) == (name == variants.BASELINE)
        # Weights are arguments, in as few bytes as they are stored in.
        share = row["arguments"] / rows[part, variants.BASELINE]["arguments"]
        quantized = {"bfloat16": 0.51, "jaxquant w4a8": 0.4, "jaxquant w4a16": 0.4}
        assert share <= (1 if name == variants.BASELINE else quantized.get(name, 0.6)), name


def test_serving_pairs_can_be_made_again_from_the_raw_seconds(result):
    seconds = {(row["part"], row["variant"]): row["seconds"] for row in result["serving"]}
    assert [(p["part"], p["ours"], p["other"]) for p in result["serving_pairs"]] == list(
        serving.PAIRS
    )
    for pair in result["serving_pairs"]:
        ours, other = (seconds[pair["part"], pair[side]] for side in ("ours", "other"))
        again = timing.paired_ratio(ours, other)
        assert again == {k: pair[k] for k in again}


def test_ratios_can_be_made_again_from_the_raw_seconds(result):
    seconds = {(row["api"], row["variant"]): row["seconds"] for row in result["steps"]}
    for row in result["steps"]:
        again = timing.paired_ratio(row["seconds"], seconds[row["api"], variants.BASELINE])
        assert again == {k: row[k] for k in again}
    for row in result["rivals"]:
        api = row["api"]
        again = timing.paired_ratio(seconds[api, row["ours"]], seconds[api, row["peer"]])
        assert again == {k: row[k] for k in again}
    baseline, *passes = result["passes"]
    assert len(passes) == 2
    for row in passes:
        again = timing.paired_ratio(row["seconds"], baseline["seconds"])
        assert again == {k: row[k] for k in again}


def test_the_machine_the_versions_and_the_config_are_recorded(result):
    assert result["machine"]["cpu"]
    assert result["machine"]["cores"] >= 1
    assert {"jax", "flax", "qwix", "aqtp"} <= set(result["versions"])
    assert result["config"] == dataclasses.asdict(study.PRESETS["smoke"])


def test_the_report_and_the_printed_table_name_every_variant(finished, result):
    workdir, done = finished
    page = (workdir / "report.html").read_text()
    for row in result["steps"] + result["serving"]:
        assert row["variant"] in page
        assert row["variant"] in done.stdout
    assert "2 rounds are too few for an interval at 90 %" in done.stdout
    assert (workdir / "figures" / "ratios.svg").stat().st_size > 1000
    assert "Warning" not in done.stderr


# ---- without the peers, and bad input


@pytest.mark.usefixtures("_lenient")
def test_peers_switched_off_are_said_to_be(monkeypatch, tmp_path):
    config = dataclasses.replace(
        study.PRESETS["smoke"], parts="train", peers=False, width=16, matrix=16, rounds=5
    )
    monkeypatch.setattr(study, "APIS", ("linen",))
    some = [variants.make_variants(peers=False)[i] for i in (0, 3)]
    monkeypatch.setattr(study, "make_variants", lambda peers: [] if peers else some)
    result = study.run(config, tmp_path)
    assert {row["library"] for row in result["steps"]} == {"jax", "jaxquant"}
    assert result["rivals"] == result["serving"] == []
    for row in result["steps"]:
        assert row["low"] <= row["median"] <= row["high"]
    assert "qwix" not in result["versions"]
    assert "The peers were switched off (config.peers=False)" in study.report.to_text(result)
    assert "The peers were switched off" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("_lenient")
def test_serving_alone_without_peers(monkeypatch, tmp_path):
    config = dataclasses.replace(
        study.PRESETS["smoke"],
        peers=False,
        parts="serve",
        width=16,
        decode_width=16,
        serve_rounds=5,
    )
    make = serving.make_servers
    monkeypatch.setattr(study, "make_servers", lambda part, peers: make(part, peers)[::2])
    result = study.run(config, tmp_path)
    assert result["steps"] == result["rivals"] == result["passes"] == []
    names = [(row["part"], row["variant"]) for row in result["serving"]]
    assert names == [
        (serving.FORWARD, "float32"),
        (serving.FORWARD, "jaxquant w8a8"),
        (serving.FORWARD, "jaxquant w4a8"),
        (serving.DECODE, "float32"),
        (serving.DECODE, "jaxquant w8a16"),
    ]
    for row in result["serving"]:
        assert row["low"] <= row["median"] <= row["high"]
    text = study.report.to_text(result)
    assert "jaxquant w8a16 over float32 (one token)" in text
    assert "The peers were switched off" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("_lenient")
def test_optimizers_alone(monkeypatch, tmp_path):
    config = dataclasses.replace(study.PRESETS["smoke"], parts="optim", width=16, optim_rounds=5)
    make = optimizers.jax_optimizers
    some = (optimizers.EXACT, optimizers.OURS, "torchao's codec in JAX, 4 bits")
    monkeypatch.setattr(optimizers, "jax_optimizers", lambda: {k: make()[k] for k in some})
    result = study.run(config, tmp_path)
    assert result["steps"] == result["serving"] == []
    bits = {
        row["variant"]: 4 * row["bytes"] / row["elements"]
        for row in result["optimizers"]
        if row["contest"] == optimizers.MATRIX
    }
    assert bits[some[0]] == pytest.approx(32, abs=0.01)
    assert bits[some[1]] < 5
    assert bits[some[2]] == pytest.approx(4.25, abs=0.01)
    for row in result["optimizers"]:
        assert row["low"] <= row["median"] <= row["high"]
    contests = [pair["contest"] for pair in result["optimizer_pairs"]]
    assert contests == [optimizers.MATRIX] * 2 + [optimizers.TREE] * 2 + [optimizers.STEP]
    assert f"{optimizers.OURS} over" in study.report.to_text(result)
    assert "Optimizer state" in (tmp_path / "report.html").read_text()


def test_torch_peers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(optimizers, "TORCH_PEERS", ("no_such_torch",))
    with pytest.raises(ValueError, match=r"config\.torch_peers needs no_such_torch: pip install"):
        optimizers.check_torch()


@pytest.mark.usefixtures("_lenient")
def test_a_model_that_serves_in_floating_point_is_named():
    tokens = jnp.zeros((2, 8), jnp.int32)
    plain, _, w8a8 = serving.make_servers(serving.FORWARD, peers=False)[:3]
    service = serving.open_service(w8a8, SHAPE, tokens, seed=0)
    assert serving.service_deviation(service, SHAPE, 16) == ""
    wider = dataclasses.replace(SHAPE, width=32)
    assert "are not the linears'" in serving.service_deviation(service, wider, 16)
    claimed = dataclasses.replace(plain, is_integer=True)
    floating = serving.open_service(claimed, SHAPE, tokens, seed=0)
    assert "0 int8 products where the linears have 7" in serving.service_deviation(
        floating, SHAPE, 16
    )


@pytest.mark.parametrize("package", variants.PEERS)
def test_a_missing_peer_is_an_error_that_names_the_extra(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    for other in set(variants.PEERS) - {package}:
        pytest.importorskip(other, reason="the peers' extra is not installed")
    with pytest.raises(
        ValueError, match=r'^\w+ not installed: pip install "jaxquant\[benchmark\]"'
    ):
        study.run(study.PRESETS["smoke"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_input_ends_with_one_line_and_status_two(tmp_path):
    (tmp_path / "file").write_text("")
    flags = {
        "--preset is one of smoke, laptop, full; got 'tpu'": "--preset=tpu",
        "config.rounds must be a number above 0; got 0": "--config.rounds=0",
        "width 64 must be 5 heads": "--config.heads=5",
        "config.parts is one or more of train, serve, optim; got 'decode'": "--config.parts=decode",
        "is not --config.FIELD=VALUE": "--config.warmup=1",
        "cannot be written": f"--workdir={tmp_path / 'file' / 'work'}",
    }

    def run(flag: str) -> subprocess.CompletedProcess:
        return benchmark(tmp_path / "work", "--config.peers=False", flag)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for words, done in zip(flags, pool.map(run, flags.values()), strict=True):
            assert done.returncode == 2, (words, done.stderr[-1000:])
            (line,) = done.stderr.strip().splitlines()
            assert line.startswith("error: ")
            assert words in line
            assert done.stdout == ""
    assert not (tmp_path / "work").exists()


def test_another_studys_folder_is_left_alone(tmp_path):
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another study"):
        study.run(dataclasses.replace(study.PRESETS["smoke"], peers=False), tmp_path)


# ---- timing


def test_the_interval_of_eleven_values_runs_from_the_third_to_the_third_last():
    # P(Binomial(11, ½) < 3) = 67 / 2048 = 3.3 %, and < 4 it is 232 / 2048 = 11.3 %; 5 % is allowed.
    values = list(range(1, 12))
    random.Random(0).shuffle(values)
    assert timing.median_interval(values) == (3, 9)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 101])
def test_the_interval_against_the_binomial_distribution(count):
    low, high = timing.median_interval(list(range(1, count + 1)))
    ranks = [k for k in range(1, count + 1) if stats.binom.cdf(k - 1, count, 0.5) <= 0.05]
    assert low == (max(ranks) if ranks else None)
    assert high == (None if low is None else count + 1 - low)


def test_a_race_runs_everyone_once_a_round_from_another_place_each_time():
    order = []
    seconds = timing.interleaved_timing(
        {name: lambda name=name: order.append(name) for name in "abc"}, 4
    )
    assert "".join(order) == "abcbcacababc"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 4, "b": 4, "c": 4}


# ---- models and steps


def test_both_models_have_the_same_parameters():
    linen = jax.eval_shape(LinenLM(SHAPE).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    in_nnx = nnx.eval_shape(lambda: nnx.state(NnxLM(SHAPE, nnx.Rngs(0)), nnx.Param))
    shapes = [sorted(x.shape for x in jax.tree.leaves(tree)) for tree in (linen, in_nnx)]
    assert shapes[0] == shapes[1]
    assert sum(1 for _ in SHAPE.linears) + 4 == len(shapes[0])  # an embedding and three norms


@pytest.mark.usefixtures("_lenient")
def test_a_step_that_quantizes_less_is_named():
    tokens = jnp.zeros((2, 9), jnp.int32)
    (w8a8,) = (v for v in variants.make_variants(peers=False) if v.name == "jaxquant w8a8")
    contestant = step.enter(w8a8, "linen", SHAPE, tokens, seed=0)
    assert step.deviation(contestant, SHAPE, tokens=16) == ""
    deeper = dataclasses.replace(SHAPE, layers=2)
    assert "7 int8 products where the linears have 13" in step.deviation(contestant, deeper, 16)
    wider = dataclasses.replace(SHAPE, width=32)
    assert "are not the linears'" in step.deviation(contestant, wider, 16)
