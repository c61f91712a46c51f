"""Tables of runs that others publish: read, refused, and what is found in tables whose law is known."""

import copy
import itertools
import json
import sys

import children
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from experiments.public_runs import analysis, efficiencies, gaps, joint, readers
from jaxquant import laws

SIZES = {"30M": 30482560, "50M": 49556736, "100M": 102777856, "200M": 203188480}
STEPS = (2861, 5722, 11444, 22888, 45776)  # at 30M, and longer in proportion to N
PAIRS = {("BF16", "BF16"): (16, 16), ("QuEST", "BF16"): (4, 16)}
PAIRS |= {("BF16", "AlbertTsengQuantizer"): (16, 4), ("QuEST", "AlbertTsengQuantizer"): (4, 4)}


def quartet_losses(noise=1e-3, seed=0):
    """Quartet's table, of its own law with noise."""
    rng, found = np.random.default_rng(seed), {}
    for size, (forward, backward) in itertools.product(SIZES, PAIRS):
        of_forward, of_backward = PAIRS[forward, backward]
        steps = [round(s * SIZES[size] / SIZES["30M"]) for s in STEPS]
        runs = {"N": [SIZES[size]] * len(steps), "D": [s * 512 * 512 for s in steps]}
        runs |= {"P_forward": [of_forward] * len(steps), "P_backward": [of_backward] * len(steps)}
        losses = efficiencies.QUARTET_2025.law.predict(efficiencies.QUARTET_2025.params, runs)
        losses = losses * np.exp(noise * rng.normal(size=len(steps)))
        own = found.setdefault(size, {}).setdefault(forward, {})
        own[backward] = dict(zip(steps, losses.round(5).tolist(), strict=True))
    return found


def notebook(losses, sizes=SIZES):
    """A notebook in the shape of theirs: comments, other code in the cell, text around it."""
    table = f"size_fwd_bwd_iters_loss = {losses!r}\n# 381469: 2.75457,\n"
    cells = ["import matplotlib.pyplot as plt", table.splitlines(keepends=True)]
    cells.append(f"import numpy as np\nstr_size_to_int = {sizes!r}\nplt.figure(figsize=(6, 2))\n")
    code = [{"cell_type": "code", "source": source} for source in cells]
    return {"cells": [{"cell_type": "markdown", "source": "# str_size_to_int = {}"}, *code]}


def quest_run(size, tokens, bits, loss, quantizer=None, **changes):
    kind = quantizer or ("NoQuantizer" if bits == 16 else "HadamardTrustQuantizer")
    settings = {} if kind in ("NoQuantizer", "HalfHadamardFP4TrustQuantizer") else {"bits": bits}
    args = {f"{x}_quant": kind for x in "wa"}
    args |= {f"{x}_quant_kwargs": settings for x in "wa" if settings}
    run = {"model_size": int(size[:-1]), "non_embedding_parameters": SIZES[size], "loss": loss}
    run |= {"tokens": tokens, "w_bits": bits, "a_bits": bits, "w_quant": kind, "a_quant": kind}
    return run | {"args": args} | changes


def quest_runs(noise=1e-3, seed=0):
    """QuEST's table, of its form with noise: full precision at one D/N, few bits at three; and FP4."""
    rng, rows = np.random.default_rng(seed), []
    params = dict(laws.QUEST_2025.params) | {"E": 1.7, "alpha": 0.3, "A": 150.0}
    for size, bits, steps in itertools.product(SIZES, (1, 2, 3, 4, 8, 16), STEPS[:3]):
        if bits in (8, 16) and steps != STEPS[2]:
            continue
        tokens = round(steps * SIZES[size] / SIZES["30M"]) * 512 * 512
        run = {"N": [SIZES[size]], "D": [tokens], "P_w": [bits]}
        loss = float(laws.QUEST_2025.law.predict(params, run)[0] * np.exp(noise * rng.normal()))
        rows.append(quest_run(size, tokens, bits, loss))
        if bits == 4 and steps == STEPS[2]:
            rows.append(quest_run(size, tokens, 16, loss, "HalfHadamardFP4TrustQuantizer"))
    return rows


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---- reading


def test_fp4_written_as_16_bits_is_read_as_4(tmp_path):
    run = quest_run("30M", 3_000_000_000, 16, 3.3, "HalfHadamardFP4TrustQuantizer")
    full = quest_run("30M", 3_000_000_000, 16, 3.2)
    table = readers.read_quest(written(tmp_path, "runs.json", [run, full]))
    assert table["P_w"].tolist() == [4, 16]
    assert table["P_a"].tolist() == [4, 16]
    assert table["scheme"].tolist() == ["W4A4, FP4", readers.FULL]
    assert table["N"].tolist() == [30482560.0] * 2


@pytest.mark.parametrize(
    ("quantizers", "bits", "scheme"),
    [
        (("HadamardTrustQuantizer", "HadamardTrustQuantizer"), (3, 3), "W3A3"),
        (("TrustQuantizer", "TrustQuantizer"), (3, 3), "W3A3, not rotated"),
        (("HalfHadamardTrustQuantizer", "NoQuantizer"), (2, 16), "W2 alone"),
        (("HadamardFourEightTrustQuantizer", "HadamardTrustQuantizer"), (4, 4), "W4A4, 2:4 sparse"),
    ],
)
def test_schemes_have_names(tmp_path, quantizers, bits, scheme):
    args = {f"{x}_quant_kwargs": {"bits": b} for x, b in zip("wa", bits, strict=True) if b < 16}
    changes = dict(
        zip(("w_quant", "a_quant", "w_bits", "a_bits"), (*quantizers, *bits), strict=True)
    )
    run = quest_run("30M", 10**9, 4, 3.0, **changes, args=args)
    found = readers.read_quest(written(tmp_path, "runs.json", [run])).iloc[0]
    assert (found["scheme"], found["P_w"], found["P_a"]) == (scheme, *bits)


def test_quartets_names_are_bits_of_products_and_iterations_are_tokens(tmp_path):
    losses = {
        "30M": {"QuEST": {"BF16": {2861: 3.48}}, "BF16": {"AlbertTsengQuantizer": {2861: 3.43}}}
    }
    table = readers.read_quartet(written(tmp_path, "plots.ipynb", notebook(losses)))
    assert table["P_forward"].tolist() == [4, 16]
    assert table["P_backward"].tolist() == [16, 4]
    assert table["D"].tolist() == [2861 * 512 * 512] * 2
    assert table["backward"][1] == "MXFP4, stochastic rounding"


def bad_quest(quantizer=None, **changes):
    good = quest_run("30M", 10**9, 4, 3.2)
    return [good, quest_run("30M", 10**9, 4, 3.2, quantizer) | changes]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "must be JSON"),
        ({}, "must hold a list of runs"),
        ([3], "run 0 of .* must be an object"),
        ([{"loss": 3.0}], "run 0 of .* has no model_size, non_embedding_parameters, tokens"),
        (bad_quest(loss=None), "loss of run 1 of .* must be a number"),
        (bad_quest(w_quant="MagicQuantizer"), "run 1 .*w_quant is one of .* got 'MagicQuantizer'"),
        (bad_quest(w_bits=16), "run 1 .* contradicts w_bits = 16"),
        (bad_quest(args={}), "run 1 .* contradicts w_bits = 4"),
        (bad_quest(args={}, w_bits=16, a_bits=16), "contradicts w_bits = 16"),
        (bad_quest(quantizer="NoQuantizer"), "NoQuantizer .* contradicts w_bits = 4"),
        (bad_quest(quantizer="HalfHadamardFP4TrustQuantizer", w_bits=8), "it has 4 bits"),
        (bad_quest(a_quant="TrustQuantizer"), "a_quant is 'TrustQuantizer', but its args say"),
    ],
)
def test_bad_tables_of_quest_are_one_error(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        readers.read_quest(written(tmp_path, "runs.json", content))


ONE = {"30M": {"QuEST": {"BF16": {2861: 3.48}}}}


def cells(*sources):
    return {"cells": [{"cell_type": "code", "source": source} for source in sources]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not JSON", "must be JSON"),
        ([], "must be a notebook with cells"),
        (cells("x = 1"), "has no cell that assigns size_fwd_bwd_iters_loss"),
        (cells(f"size_fwd_bwd_iters_loss = {ONE}"), "has no cell that assigns str_size_to_int"),
        (cells("size_fwd_bwd_iters_loss = {"), "is no Python"),
        (cells("size_fwd_bwd_iters_loss = __import__('os').environ"), "a dictionary written out"),
        (notebook({"30M": {"Magic": {"BF16": {2861: 3.4}}}}), "quantizers are of .* got 'Magic'"),
        (notebook({"30M": {"BF16": {2861: 3.4}}}), "30M/BF16/2861 must map iterations; got 3.4"),
        (notebook({"7B": {"BF16": {"BF16": {2861: 3.4}}}}), "str_size_to_int has no '7B'"),
        (notebook({"30M": {"BF16": {"BF16": {2861: "3.4"}}}}), "the loss of 30M, BF16, BF16, 2861"),
        (notebook({"30M": {"BF16": {"BF16": {2.5: 3.4}}}}), "the iterations of 30M"),
    ],
)
def test_bad_tables_of_quartet_are_one_error(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        readers.read_quartet(written(tmp_path, "plots.ipynb", content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    for read in (readers.read_quest, readers.read_quartet):
        with pytest.raises(ValueError, match=r"nothing.json', cannot be read: No such file"):
            read(tmp_path / "nothing.json")


def test_a_loss_that_rises_with_training_is_left_out(tmp_path):
    losses = copy.deepcopy(quartet_losses())
    own = losses["30M"]["QuEST"]["BF16"]
    own[max(own)] = own[max(own)] + 0.3
    table = readers.read_quartet(written(tmp_path, "plots.ipynb", notebook(losses)))
    found = table[readers.rising(table)]
    assert found[["scheme", "D"]].to_numpy().tolist() == [["QuEST/BF16", max(own) * 512 * 512]]


# ---- known truths


def growing_pairs(gamma_d, gamma_n, noise=0.03, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(n, 25 * n * 2**i) for n in SIZES.values() for i in range(5)]
    table = pd.DataFrame(rows, columns=["N", "D"]).astype(float)
    gap = 0.07 * (table["D"] / 5e9) ** gamma_d * (table["N"] / 1e8) ** gamma_n
    gap = gap * np.exp(noise * rng.normal(size=len(table)))
    size = table["N"].map({float(n): size for size, n in SIZES.items()})
    return table.assign(added=gap, unit=table["D"].astype(str) + size, size=size)


@pytest.mark.parametrize("exponents", [(0.1, -0.175), (-0.13, 0.1)])
def test_exponents_of_a_gap_are_found_within_intervals_as_often_as_they_say(exponents):
    inside = []
    for seed in range(40):
        found = gaps.least_squares(growing_pairs(*exponents, seed=seed), "x", bootstraps=300)
        assert found is not None
        for name, true in zip(("gamma_D", "gamma_N"), exponents, strict=True):
            low, high = found.interval(name)
            inside.append(low <= true <= high)
    assert 0.8 <= np.mean(inside) <= 0.98


def test_exponents_without_noise_are_exact_and_of_what_the_runs_tell():
    pairs = growing_pairs(0.3, -0.2, noise=0.0)
    found = gaps.least_squares(pairs, "x")
    assert found is not None
    assert found.params == pytest.approx({"gamma_D": 0.3, "gamma_N": -0.2})
    one_size = gaps.least_squares(pairs[pairs["N"] == 30482560], "x")
    assert one_size is not None
    assert one_size.params == pytest.approx({"gamma_D": 0.3})
    assert gaps.least_squares(pairs[:3], "x") is None
    one_ratio = pairs[np.isclose(pairs["D"], 25 * pairs["N"])]
    assert gaps.exponents_of(one_ratio) == {gaps.SUM: "N"}


def test_ratios_are_those_of_the_exponents():
    pairs = growing_pairs(0.3, -0.2, noise=0.0)
    found = gaps.least_squares(pairs, "own")
    assert found is not None
    table = gaps.ratios(pairs, found, [found])
    np.testing.assert_allclose(table["measured"], 16**0.3)
    np.testing.assert_allclose(table["own"].tolist(), 16**0.3)
    assert gaps.difference(found, found, "gamma_D")[0] == 0


def test_pairs_share_size_and_length_and_others_drop_out():
    full = pd.DataFrame({"N": [1.0, 1.0], "D": [10.0, 20.0], "loss": [3.0, 2.5]})
    few = pd.DataFrame({"N": [1.0, 2.0], "D": [20.0, 20.0], "loss": [2.75, 9.0]})
    found = gaps.pair(few, full)
    assert found["added"].tolist() == [0.25]
    assert found["loss_full"].tolist() == [2.5]


def tables(folder):
    quest = written(folder, "runs.json", quest_runs())
    quartet = written(folder, "plots.ipynb", notebook(quartet_losses()))
    return analysis.read(quest, quartet, ROOT / "experiments/results/training_precision/full")


@pytest.mark.long
def test_efficiencies_are_found_again_in_tables_made_by_them(tmp_path):
    read = tables(tmp_path)
    assert read.left_out.empty
    base = efficiencies.quartet_base(read.quartet, 20)
    _, of_quartet = efficiencies.quartet(read.quartet, base, 60)
    by_width, of_quest = efficiencies.quest(read.quest, 60)
    joint = [e for e in of_quartet if e.how == "all at once"] + of_quest[:5]
    assert [e.published is not None for e in joint] == [True] * 7
    inside = [e.low <= (e.published or 0) <= e.high for e in joint]
    assert sum(inside) >= 6, joint
    pairs = analysis.quartet_pairs(read.quartet)
    pairs = pairs[pairs["scheme"] == "QuEST/BF16"]
    moved = gaps.transferred(base, by_width, pairs, "moved")
    params = {**efficiencies.QUARTET_2025.params, "eff_N_4": laws.QUEST_2025.params["eff_4"]}
    law = efficiencies.QUARTET_2025.law
    few, full = (law.predict(params, pairs.assign(P_forward=bits)) for bits in (4, 16))
    true = gaps.least_squares(pairs.assign(added=few - full), "true")
    assert true is not None
    for name, value in true.params.items():
        low, high = moved.interval(name)
        assert low <= value <= high, name


PLANTED = {
    joint.GROWING: {
        **{"C_forward": 0.18, "gamma_D_forward": 0.15, "gamma_N_forward": -0.2},
        **{"C_backward": 0.05, "gamma_D_backward": -0.2, "gamma_N_backward": 0.15},
    },
    joint.CANDIDATES[1]: {"eff_forward": 0.6, "eff_backward": 0.85},
    joint.CANDIDATES[3]: {"eff_forward": 0.6, "eff_backward": 0.85},
}


def planted(law):
    """Runs of a law, at Quartet's sizes, lengths and schemes; noise of 0.0003 in log L."""
    schemes = [readers.FULL, efficiencies.FORWARD, efficiencies.BACKWARD, joint.BOTH]
    bits = dict(zip(schemes, [(16, 16), (4, 16), (16, 4), (4, 4)], strict=True))
    rows = [
        {"N": n, "D": n * ratio, "scheme": scheme, "unit": f"{n}/{ratio}"}
        | dict(zip(("P_forward", "P_backward"), bits[scheme], strict=True))
        for n in (30e6, 50e6, 100e6, 200e6)
        for ratio in (25, 50, 100, 200, 400, 800)
        for scheme in schemes
    ]
    table = pd.DataFrame(rows)
    params = {k: v for k, v in efficiencies.QUARTET_2025.params.items() if not k.startswith("eff")}
    noise = np.exp(np.random.default_rng(0).normal(0, 3e-4, len(table)))
    return table.assign(loss=law.predict({**params, **PLANTED[law]}, table) * noise)


@pytest.mark.long
@pytest.mark.parametrize("law", PLANTED, ids=lambda law: law.name)
def test_the_law_that_made_the_runs_is_found_among_the_candidates(law):
    found = joint.compare(planted(law), bootstraps=20, starts=16)
    assert found.runs == 96
    assert found.rows[0]["law"] == law.name
    assert found.rows[1]["delta_aicc"] > 10
    if law is joint.GROWING:
        for name in (
            "gamma_D_forward",
            "gamma_N_forward",
        ):  # the backward term is small beside noise
            assert abs(found.growing.params[name] - PLANTED[law][name]) < 0.05, name


@pytest.mark.long
def test_the_binary_says_what_it_found(tmp_path):
    quest = written(tmp_path, "runs.json", quest_runs())
    quartet = written(tmp_path, "plots.ipynb", notebook(quartet_losses()))
    done = binary(
        f"--quest={quest}", f"--quartet={quartet}", f"--workdir={tmp_path}/out", "--bootstraps=4"
    )
    assert done.returncode == 0, done.stderr
    assert "Are the published efficiencies found again?" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["runs"]["quartet"] == 80
    assert {row["size"] for row in summary["ratios"]} == set(SIZES)
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "figures" / "gap.svg").exists()


def binary(*flags):
    command = [sys.executable, "-m", "experiments.public_runs", *flags]
    return children.run(command, timeout=600, cwd=ROOT)


def test_bad_input_is_one_line_and_status_2(tmp_path):
    bad = written(tmp_path, "runs.json", [])
    for flags, words in (
        (["--quest=x"], "--quartet must be given"),
        ([f"--quest={bad}", "--quartet=y", "--workdir=z"], "must hold a list of runs"),
    ):
        done = binary(*flags)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
