import copy
import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import jaxquant as jq
from experiments.harness import data
from experiments.harness.data import images
from experiments.harness.running import packed, record_store
from experiments.harness.training import train
from experiments.qat_efficiency import analysis, latency, measuring, report, stages, study, tasks
from experiments.qat_efficiency.stages import Arm

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others

SMOKE = study.PRESETS["smoke"]


# ---- records made up, with effects that are known


def split_record(
    accuracy: float, nll: float, base: tuple[float, float], silent=(), se=0.001
) -> dict:
    def change(value):
        return {"estimate": value, "se": se, "low": value - se, "high": value + se}

    return {
        "n": 100,
        "n_clusters": None,
        "quantized": {"accuracy": accuracy, "nll": nll, "brier": 0.1, "ece": 0.02},
        "accuracy_difference": change(accuracy - base[0]),
        "log_perplexity_ratio": change(nll - base[1]),
        "flips": {
            "lost": 3,
            "gained": 1,
            "rate": 0.04,
            "chi2": 0.25,
            "p_value": 0.6,
            "exact": True,
        },
        "agreement": 0.97,
        "kl": {"mean": 0.01, "p99": 0.1},
        "worst_group": {"name": "Shirt", "change": -0.02, "p_value": 0.5},
        "regressions": list(silent),
        "silent_regressions": list(silent),
        "gate": "inconclusive",
        "not_passed": {"mean KL": "inconclusive"},
    }


def record(model: str, seed: int, entries: dict[Arm, dict]) -> dict:
    """A record of arms with {accuracy, nll, chosen (selection), silent, status, shift, ratio, size}."""
    base = next((e["accuracy"], e["nll"]) for a, e in entries.items() if a.name == "float")
    made = []
    for arm, entry in entries.items():
        result = {"status": entry.get("status", "done"), "bytes": {"total": entry.get("size", 100)}}
        result |= {"rate": 0.3 if seed else 1.0} if arm.family == "qat" else {}
        if result["status"] == "done":
            main = split_record(entry["accuracy"], entry["nll"], base, entry.get("silent", ()))
            splits = {"test": main} if model == "vision" else {"valid": main}
            if model == "language":
                splits["shift"] = split_record(0.5, base[1] + entry.get("shift", 0.0), base)
            chosen = entry.get("chosen", entry)
            ratio = entry.get("ratio", 1.0)
            corruption = {
                "errors": {"rotate": [0.1]},
                "mean": ratio,
                "by_corruption": {"rotate": ratio},
            }
            result |= {
                "splits": splits,
                "selection": {"accuracy": chosen["accuracy"], "nll": chosen["nll"]},
                "corruption": corruption if model == "vision" else None,
            }
        made.append(dataclasses.asdict(arm) | result)
    widths = {arm.width for arm in entries}
    return {
        "id": f"{model}{seed}",
        "status": "done",
        "trial": dataclasses.asdict(trial(model, seed)),
        "versions": {"jaxquant": "0", "jax": "0", "device": "cpu"},
        "reference_rate": 0.3,
        "derived": {w: {"macs": 10, "bit_operations": 640 if w else 2560} for w in widths},
        "arms": made,
    }


def trial(model: str, seed: int) -> stages.Trial:
    settings = tasks.Settings(model, "8k", "digits", "", "abc", 64, 100, 50)  # pyright: ignore
    arms = {"widths": ("w4a4",), "methods": ("rtn",), "estimators": ("ste",)}
    choices = {"rates": (0.3, 1.0), "groups": (0, 32), "activations": ("tensor",)}
    steps = {"steps": 10, "finetune_steps": 5, "log_every": 5, "checkpoint_every": 50}
    return stages.Trial(
        settings, seed, peak_lr=0.1, calibration_batches=2, **steps, **arms, **choices
    )


RTN, GPTQ = (Arm("ptq", m, "w4a4") for m in ("rtn", "gptq"))
STE, LSQ = (Arm("qat", m, "w4a4") for m in ("ste", "lsq"))
GAINS = (0.03, 0.05, 0.04)  # of LSQ over GPTQ by seed


def vision_records(gains=GAINS, **lsq) -> list[dict]:
    noise = [0.0, 0.01, -0.01, 0.005, 0.0]
    return [
        record(
            "vision",
            seed,
            {
                Arm("float"): {"accuracy": 0.9 + noise[seed], "nll": 0.3, "size": 400},
                RTN: {
                    "accuracy": 0.99,  # better where it counts for nothing
                    "nll": 0.5,
                    "chosen": {"accuracy": 0.5, "nll": 0.9},
                },
                GPTQ: {"accuracy": 0.8 + noise[seed], "nll": 0.5, "silent": ("Coat",), "size": 90},
                STE: {"accuracy": 0.7, "nll": 0.6},
                LSQ: {"accuracy": 0.8 + noise[seed] + gain, "nll": 0.4} | lsq,
            },
        )
        for seed, gain in enumerate(gains)
    ]


def language_records(gap: float, seeds=3) -> list[dict]:
    jitter = [-0.001, 0.0, 0.001]
    return [
        record(
            "language",
            seed,
            {
                Arm("float"): {"accuracy": 0.5, "nll": 1.5},
                GPTQ: {"accuracy": 0.5, "nll": 1.6},
                LSQ: {"accuracy": 0.5, "nll": 1.6 - gap + jitter[seed], "shift": 0.01},
            },
        )
        for seed in range(seeds)
    ]


# ---- analysis


def test_an_interval_over_seeds_is_students_and_over_examples_normal():
    values = [0.1, 0.4, 0.3, 0.2]
    found = analysis.interval(values, [None] * 4)
    expected = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose((found["low"], found["high"]), expected)
    assert found["how"] == "seeds"
    few = analysis.interval([0.1, 0.3], [0.03, 0.04])
    np.testing.assert_allclose(few["high"] - 0.2, stats.norm.ppf(0.95) * 0.025)
    assert few["how"] == "examples"
    assert analysis.interval([0.1], [None]) | {"mean": 0} == {
        "mean": 0, "low": None, "high": None, "seeds": 1, "how": "none",
    }  # fmt: skip


def test_methods_are_chosen_on_the_selection_and_compared_elsewhere():
    row = best(vision_records())
    assert (row["ptq"], row["qat"], row["answer"]) == ("gptq", "lsq", "qat")
    expected = stats.t.interval(0.9, 2, loc=np.mean(GAINS), scale=stats.sem(GAINS))
    np.testing.assert_allclose((row["low"], row["high"]), expected)


def best(records: list[dict]) -> dict:
    rows = analysis.comparisons(analysis.arms(records))
    (row,) = (row for row in rows if row["scope"] == "best")
    return row


def with_groups(records: list[dict]) -> list[dict]:
    """The records with groups of 32 that are worse after training, and better with it."""
    for one in records:
        for arm, change in ((GPTQ, -0.1), (LSQ, 0.02)):
            (made,) = (
                copy.deepcopy(a) for a in one["arms"] if Arm(*arm_fields(a)).name == arm.name
            )
            made["group"] = 32
            for place in (made["selection"], made["splits"]["test"]["quantized"]):
                place["accuracy"] += change
            one["arms"].append(made)
    return records


def arm_fields(made: dict) -> list:
    return [made[field.name] for field in dataclasses.fields(Arm)]


def test_comparisons_pair_like_with_like_and_count_each_pair_once():
    rows = analysis.comparisons(analysis.arms(with_groups(vision_records())))
    found = {row["scope"]: (row["qat"], row["ptq"]) for row in rows}
    assert found == {
        "best": ("lsq g32", "gptq"),
        "channel": ("lsq", "gptq"),
        "g32": ("lsq g32", "gptq g32"),
        "ste": ("ste", "gptq"),
        "lsq": ("lsq g32", "gptq"),
    }
    by_scope = {row["scope"]: row for row in rows}
    changes = {"best": 0.02, "channel": 0.0, "g32": 0.12}
    for scope, change in changes.items():
        test: Any = stats.ttest_1samp(np.array(GAINS) + change, 0)
        expected = test.pvalue
        np.testing.assert_allclose(by_scope[scope]["p"], expected)
    assert by_scope["best"]["rates"] == {"0.3": 2, "1": 1}
    assert by_scope["lsq"]["q"] == by_scope["best"]["q"]
    once = [by_scope[scope] for scope in ("best", "channel", "g32", "ste")]
    expected = stats.false_discovery_control([row["p"] for row in once])
    np.testing.assert_allclose([row["q"] for row in once], expected)


def test_both_p_and_q_are_shown_and_what_an_unresolved_gain_could_have_been():
    summary = analysis.summarize(with_groups(vision_records()), 3)
    text = report.to_text(summary)
    row = next(r for r in summary["comparisons"] if r["scope"] == "best")
    assert f"p {row['p']:.2g}, q {row['q']:.2g}" in text
    shown = report.comparison_table(summary["comparisons"])
    assert shown["p"].tolist() == [f"{r['p']:.2g}" for r in summary["comparisons"]]
    assert shown["q"].tolist() == [f"{r['q']:.2g}" for r in summary["comparisons"]]
    unresolved = vision_records((-0.1, 0.1, 0.0))
    half = stats.t.ppf(0.95, 2) * stats.sem((-0.1, 0.1, 0.0))
    text = report.to_text(analysis.summarize(unresolved, 3))
    assert f"the least effect that these runs could show is {half:.4f} accuracy" in text


def test_a_lower_nll_is_a_gain_for_language():
    answers = {}
    for gap in (0.05, 0.0, -0.05):
        row = best(language_records(gap))
        np.testing.assert_allclose(row["mean"], gap, atol=1e-9)
        answers[gap] = row["answer"]
    assert answers == {0.05: "qat", 0.0: "unresolved", -0.05: "ptq"}


def test_a_method_that_broke_in_some_seed_is_not_chosen():
    records = vision_records()
    broken = next(a for a in records[1]["arms"] if a["method"] == "lsq")
    for key in ("splits", "selection", "corruption"):
        broken.pop(key)
    broken["status"] = "diverged"
    assert best(records)["qat"] == "ste"
    summary = analysis.summarize(records, 3)
    assert summary["broken"] == [
        {"model": "vision", "seed": 1, "arm": "qat lsq w4a4", "status": "diverged"}
    ]
    json.dumps(summary, allow_nan=False)


def test_the_front_holds_what_nothing_as_small_surpasses():
    rng = np.random.default_rng(0)
    entries = {Arm("float"): {"accuracy": 0.5, "nll": 1.0, "size": 9}} | {
        Arm("ptq", f"m{i}", "w4a4"): {
            "accuracy": float(rng.integers(5)) / 10,
            "nll": 1.0,
            "size": int(rng.integers(1, 9)),
        }
        for i in range(30)
    }
    means = analysis.over_seeds(analysis.arms([record("vision", 0, entries)]))
    points = {a.name: (e["size"], e["accuracy"]) for a, e in entries.items()}
    expected = {
        name
        for name, (size, good) in points.items()
        if all(not (s <= size and g >= good) or (s, g) == (size, good) for s, g in points.values())
    }
    assert analysis.front(means, "vision") == expected


def test_silent_regressions_are_counted_by_seed_and_named():
    means = analysis.over_seeds(analysis.arms(vision_records()))
    (row,) = analysis.select(means, arm="ptq gptq w4a4").to_dict("records")
    assert row["silent"] == {"Coat": 3}
    assert "vision ptq gptq w4a4 (Coat)" in report.to_text(analysis.summarize(vision_records(), 3))


def test_losses_elsewhere_are_hidden_only_where_the_mean_is_kept():
    kept = analysis.summarize(language_records(0.1), 3)["hidden"]  # as good as float on "valid"
    lost = analysis.summarize(language_records(0.05), 3)["hidden"]
    # Three equal values have an interval of no width.
    assert [(r["arm"], r["where"]) for r in kept] == [("qat lsq w4a4", "shift")]
    assert lost == []
    ratios = [1.1, 1.2, 1.3]
    records = vision_records(gains=(0.1, 0.11, 0.09))
    for r, ratio in zip(records, ratios, strict=True):
        arm = next(a for a in r["arms"] if a["method"] == "lsq")
        arm["corruption"]["by_corruption"]["rotate"] = ratio
    (row,) = analysis.summarize(records, 3)["hidden"]
    assert (row["arm"], row["where"]) == ("qat lsq w4a4", "rotate")
    np.testing.assert_allclose(row["mean"], 1.2)


# ---- the report


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (
            vision_records(),
            "vision W4A4, training by lsq over gptq: training is better, +0.0400",
        ),
        (
            vision_records((-0.03, -0.05, -0.04)),
            "lsq over gptq: quantizing after training is better",
        ),
        (vision_records((-0.1, 0.1, 0.0)), "lsq over gptq: unresolved"),
        (vision_records(GAINS[:1]), "fewer than 3 seeds ran"),
        (language_records(0.05, seeds=2), "nats; the interval is over examples"),
        ([], "there is nothing to compare"),
    ],
)
def test_the_verdict_says_what_was_found_whichever_way_it_went(records, words):
    text = report.to_text(analysis.summarize(records, len(records)))
    assert words in text
    assert ("1 of 3 trials are finished" in report.to_text(analysis.summarize(records[:1], 3))) == (
        len(records) > 0
    )


def test_a_report_of_made_up_records_is_written(tmp_path):
    rows = [
        {
            "model": "vision",
            "width": "w4a4",
            "program": "rtn",
            "median": 0.8,
            "low": 0.7,
            "high": 0.9,
        }
    ]
    records = vision_records() + language_records(0.05)
    summary = report.write(tmp_path, records, rows, expected=6)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    page = (tmp_path / "report.html").read_text()
    assert "Groups that lost unseen" in page
    names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert names == {"bytes", "latency", "gain", "robustness"}
    assert "vision    ptq gptq w4a4" in report.to_text(summary)


def test_only_arms_that_multiply_integers_have_a_time():
    means = analysis.over_seeds(analysis.arms(vision_records()))
    rows = [
        {
            "model": "vision",
            "width": "w4a4",
            "program": "rtn",
            "median": 0.8,
            "low": 0.7,
            "high": 0.9,
        }
    ]
    table = report.arm_table(means, "vision", rows).set_index("arm")
    assert table["time"].to_dict() == {
        "float": "1.00",
        "ptq rtn w4a4": "0.80",
        "ptq gptq w4a4": "0.80",
        "qat ste w4a4": "0.80",
        "qat lsq w4a4": "—",
    }
    assert table["of float"].to_dict()["ptq gptq w4a4"] == "0.23"  # 90 of 400 bytes
    assert table["bit operations"].to_dict()["qat lsq w4a4"] == "0.250"


def test_records_that_were_packed_are_reported_without_times(tmp_path):
    grid = study.make_trials(SMOKE)
    store = record_store.RecordStore(tmp_path, "qat_efficiency")
    store.write(grid[0], {"status": "diverged", "step": 1, "arms": []}, 1.0)
    packed.pack(tmp_path)
    assert latency.measure(tmp_path, grid, 10) == []


def test_every_method_names_its_program():
    for method in stages.METHODS:
        assert latency.program(Arm("ptq", method, "w4a4")) in jq.ptq.METHODS
    assert [latency.program(Arm("qat", e, "w4a4")) for e in stages.ESTIMATORS] == [
        "rtn",
        None,
        None,
    ]


# ---- the grid


def test_arms_pair_every_width_with_the_methods_that_suit_it():
    changes = {"methods": stages.METHODS, "groups": (0, 32), "activations": tasks.ACTIVATIONS}
    (one, *_) = study.make_trials(dataclasses.replace(SMOKE, **changes))
    names = [arm.name for arm in one.arms]
    assert names[:2] == [stages.REFERENCE, stages.AGAIN]
    assert len(names) == len(set(names))
    assert {"ptq smoothquant w8a8", "ptq awq w2a16"} <= set(names)
    assert not {"ptq awq w8a8", "ptq smoothquant w2a16"} & set(names)
    # Of 8 bits there are no groups and no searched ranges; weights alone have no activations' scales.
    assert {"ptq gptq token w8a8", "ptq gptq g32 searched w2a16"} <= set(names)
    assert not {"ptq gptq g32 w8a8", "ptq gptq searched w8a8", "ptq gptq token w2a16"} & set(names)
    trained = [name for name in names if name.startswith("qat")]
    assert trained == ["qat lsq w8a8", "qat lsq w2a16", "qat lsq g32 w2a16"]
    after = len(names) - 2 - len(trained)
    # The reference's rates are searched, and those of weights in 2 bits per channel.
    searched, others = 2 * len(one.rates), 1 + len(trained) - 1
    assert stages.cost(one) == one.steps + one.finetune_steps * (searched + others + after / 2)


def test_statistics_are_of_as_many_examples_as_asked_for():
    config = dataclasses.replace(SMOKE, calibration_images=1000, calibration_tokens=262_144)
    batches = [t.calibration_batches for t in study.make_trials(config)]
    assert batches == [16, 512]  # of 64 images, and of 8 windows of 64 tokens


def test_a_trial_is_a_model_and_a_seed():
    made = study.make_trials(dataclasses.replace(SMOKE, seeds=3))
    assert [(t.task.model, t.seed) for t in made] == [
        (model, seed) for model in ("vision", "language") for seed in range(3)
    ]
    assert len(set(made)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": ("w9a8",)}, "widths are named"),
        ({"widths": ("int8",)}, "widths are named"),
        ({"widths": ()}, "at least one"),
        ({"methods": ("rtn", "rtn")}, "each once"),
        ({"methods": ("magic",)}, "rtn, gptq"),
        ({"estimators": ("pact",)}, "ste, lsq, quest"),
        ({"models": ("audio",)}, "vision, language"),
        ({"corruptions": ("fog",)}, "gaussian_noise"),
        ({"severities": (6,)}, "severities are of"),
        ({"vision_size": "14k"}, "vision_size is one of"),
        ({"language_size": "8k"}, "language_size is one of"),
        ({"images": "cifar"}, "fashion_mnist, digits"),
        ({"images": "fashion_mnist", "images_path": "/absent"}, "--config.images=digits"),
        ({"text": "tokens"}, "read as bytes"),
        ({"grid": 3}, "cannot be cut"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": 10**9}, "at most"),
        ({"finetune_share": 2.0}, "at most 1"),
        ({"rates": (0.3, 0.0)}, "config.rates"),
        ({"rates": ()}, "at least one"),
        ({"groups": (48,)}, "config.groups divide"),
        ({"groups": (-1,)}, "config.groups"),
        ({"activations": ("row",)}, "tensor, token"),
        ({"calibration_tokens": 0}, "calibration_tokens"),
        ({"vision_lr": math.inf}, "vision_lr"),
        ({"sequence": 10**9}, "fewer than one sequence"),
    ],
)
def test_bad_fields_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        study.make_trials(dataclasses.replace(SMOKE, **change))


@pytest.mark.parametrize("config", [*tasks.VISION_SIZES.values(), *tasks.LANGUAGE_SIZES.values()])
def test_every_size_can_be_rotated_in_blocks_of_32(config):
    assert config.width % 32 == config.hidden % 32 == 0


@pytest.mark.parametrize(
    ("arm", "arithmetic"),
    [
        (Arm("ptq", "gptq", "w2a16", 32, "searched"), "native"),
        (Arm("ptq", "gptq", "w4a4", 32, activations="token"), "simulated"),
        (Arm("ptq", "gptq", "w4a4", 0, "searched", "token"), "native"),
        (Arm("qat", "lsq", "w4a4", 32), "simulated"),
        (Arm("qat", "quest", "w4a4", 32), "simulated"),
    ],
)
def test_settings_reach_the_recipe(digits, arm, arithmetic):
    recipe = stages.arm_rules(digits, arm)["blocks/.*"]
    forward = jq.recipe(recipe).forward if isinstance(recipe, str) else recipe.forward
    assert forward.rhs is not None
    assert forward.rhs.granularity == (arm.group or "channel")
    assert (forward.rhs.calibration == jq.calibration.mse()) == (arm.ranges == "searched")
    is_row = arm.activations == "token" or arm.method == "quest"
    if forward.lhs is not None:
        assert forward.lhs.granularity == ("channel" if is_row else "tensor")
    assert (forward.lhs is None) == arm.width.endswith("a16")
    assert forward.arithmetic == arithmetic


@pytest.mark.first(1)
@pytest.mark.parametrize("estimator", stages.ESTIMATORS)
def test_rules_reach_every_layer(digits, text, estimator):
    for task, count in ((digits, 6), (text, 7)):
        table = jq.nnx.coverage(task.make(0), tasks.rules(task.settings.model, "w3a16", estimator))
        recipes = {row.path: row.recipe for row in table if row.kind != "attention"}
        inner = [recipe for path, recipe in recipes.items() if path.startswith("blocks/")]
        assert inner == ["w3a16" + tasks.SUFFIXES[estimator]] * count
        assert [r for p, r in recipes.items() if not p.startswith("blocks/")] == ["w8a16"] * 2


# ---- the tasks


@pytest.fixture(scope="module")
def digits() -> tasks.Task:
    return tasks.make_task(study.make_trials(SMOKE)[0].task)


@pytest.fixture(scope="module")
def text() -> tasks.Task:
    return tasks.make_task(study.make_trials(SMOKE)[-1].task)


def test_selection_and_evaluation_share_no_example(digits, text):
    known = {x.tobytes() for x in images.load("digits").valid.pixels}
    assert all(x.tobytes() in known for x in digits.selection.inputs)
    windows = {x.tobytes() for x in text.splits["valid"].inputs}
    assert windows.isdisjoint({x.tobytes() for x in text.selection.inputs})


def test_labels_of_text_are_the_next_tokens_and_groups_their_documents(text):
    split = text.splits["valid"]
    np.testing.assert_array_equal(split.inputs[:, 1:], split.labels[:, :-1])
    valid = data.load("sotu").evaluation["valid"]
    assert isinstance(valid, np.ndarray)
    tokens = valid.tobytes()
    assert split.groups is not None
    for row in range(0, len(split.labels), 5):
        window = split.inputs[row].astype(np.uint8).tobytes() + bytes([split.labels[row, -1]])
        at = tokens.find(window)
        for i in (0, len(split.labels[row]) - 1):
            number = tokens[: at + 1 + i].count(data.SEPARATOR) + 1
            assert split.groups[row, i] == f"document {number}"


def test_more_documents_than_bytes_are_told_apart(tmp_path):
    for i in range(3000):
        (tmp_path / f"{i:04}.txt").write_text("0123456789")
    corpus = data.load("text", str(tmp_path))
    groups = tasks._documents(corpus, "valid", 11, 300)
    assert groups is not None
    assert groups[:, 0].tolist() == [f"document {i}" for i in range(1, 300)]


def test_data_that_changed_is_an_error(digits):
    with pytest.raises(RuntimeError, match="changed"):
        tasks.make_task(dataclasses.replace(digits.settings, fingerprint="another"))


def test_corrupted_images_are_of_the_evaluated_ones(digits):
    (noisy,) = digits.corrupted["gaussian_noise"]
    clean = digits.splits["test"]
    assert len(noisy.labels) == 100
    assert not np.allclose(noisy.inputs[:10], clean.inputs[:10])


# ---- measuring


def test_bit_operations_are_macs_times_bits(digits):
    found = measuring.bit_operations(digits, "w2a16")["bit_operations"]
    tokens, width, hidden, patch, classes = 16, 32, 64, 2 * 2, 10
    patches, head = tokens * patch * width, width * classes
    block = tokens * (4 * width**2 + 2 * width * hidden)
    attention = 2 * tokens**2 * width
    assert found == (patches + head) * 8 * 16 + block * 2 * 16 + attention * 16 * 16
    everything = measuring.bit_operations(digits, None)
    assert everything["bit_operations"] == 256 * (patches + head + block + attention)
    assert everything["macs"] == patches + head + block + attention


@pytest.mark.long
@pytest.mark.parametrize(
    "arm",
    [
        Arm("qat", "lsq", "w4a4"),
        Arm("qat", "lsq", "w4a4", 32),
        Arm("qat", "quest", "w2a16"),
        Arm("qat", "quest", "w2a16", 32),
    ],
)
def test_a_frozen_arm_gives_the_logits_of_the_trained_one_in_fewer_bytes(digits, arm):
    model = digits.make(0)
    trained = stages.quantized(model, digits, arm, digits.calibration(1, 0))
    assert not jax.tree.leaves(nnx.state(trained, nnx.Not(nnx.Param))), "all that is learned trains"
    frozen = jq.nnx.freeze(trained)
    inputs = digits.selection.inputs[:20]
    found, expected = (measuring.logits(m, inputs, 10) for m in (frozen, trained))
    np.testing.assert_array_equal(found, expected)
    size, before = measuring.nbytes(frozen), measuring.nbytes(model)
    bits = tasks.parse_width(arm.width)[0]
    groups = (4 * 32, 64, 32 * 64 // 32) if arm.group else (4 * 32, 64, 32)
    block = (4 * 32**2 + 2 * 32 * 64) * bits // 8 + 4 * sum(groups)
    outer = (4 * 32 + 32 * 10) + 4 * (32 + 10)
    assert size["weights"] == block + outer
    assert size["total"] == size["weights"] + size["rest"] < before["total"] / 2
    assert before["total"] == 4 * sum(x.size for x in jax.tree.leaves(nnx.state(model)))


@pytest.mark.long
def test_learned_steps_do_not_decay_and_move_slowly(digits):
    model = stages.quantized(digits.make(0), digits, Arm("qat", "lsq", "w4a16"), [])
    params = nnx.state(model, nnx.Param)
    tx = train.adamw_and_steps()

    def update(gradients, params):
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            return tx.update(gradients, tx.init(params), params, learning_rate=1.0)[0]

    updates = update(jax.tree.map(jnp.zeros_like, params), params)
    decayed = {
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(updates)
        if np.abs(x).max() > 0
    }
    assert decayed
    assert not any("step" in name or "bias" in name for name in decayed)
    updates = update(jax.tree.map(jnp.ones_like, params), jax.tree.map(jnp.zeros_like, params))
    moved = {"step": set(), "other": set()}
    for path, x in jax.tree_util.tree_leaves_with_path(updates):
        kind = "step" if "_step" in jax.tree_util.keystr(path) else "other"
        moved[kind] |= set(np.abs(np.asarray(x, np.float64)).round(4).ravel().tolist())
    assert moved == {"step": {0.1}, "other": {1.0}}


def test_the_reference_beside_itself_loses_nothing(digits):
    model = digits.make(0)
    reference = measuring.all_logits(model, digits)
    found = measuring.measure(model, digits, reference)
    assert found["status"] == "done"
    assert found["splits"]["test"]["flips"]["rate"] == 0
    assert found["corruption"]["mean"] == 1
    json.dumps(found, allow_nan=False)
    nnx.update(model, jax.tree.map(lambda x: x * jnp.nan, nnx.state(model)))
    broken = measuring.measure(model, digits, reference)
    assert broken["status"] == "not finite"
    assert "splits" not in broken
