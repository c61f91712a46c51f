"""Measured figures in the pages are what the committed records give."""

import json
import re
import shutil
import types
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT

from experiments import tables
from experiments.harness.reporting import markdown
from experiments.harness.reporting.statistics import t_interval
from experiments.optimizer_states import STUDY as OPTIMIZER_STATES
from experiments.optimizer_states import analysis as optimizer_states
from experiments.optimizer_states import tables as state_tables
from experiments.pretrained_quantization import tables as pretrained_tables
from experiments.pretrained_quantization.arms import ARMS
from experiments.pretrained_quantization.report import rows_of
from experiments.ptq_overtraining import STUDY as PTQ
from experiments.ptq_overtraining import analysis as ptq_overtraining
from experiments.training_precision import STUDY as TRAINING

pytestmark = pytest.mark.exhaustive  # looks at our pages, not at versions of others

TEXTS = {page: path.read_text() for page, path in tables.pages().items()}
MARKED = sorted({(page, name) for page, text in TEXTS.items() for name in markdown.blocks(text)})
RESULTS = ROOT / "experiments/results"
DIGIT = re.compile(r"\d")


def summary_of(place):
    return tables.read(f"{place}/summary.json")


def test_the_pages_say_what_their_records_give():
    assert tables.differences(TEXTS) == []
    known = {"ptq_overtraining/one_law", "optimizer_states/transformations", "train/fits"}
    assert known | {"train/gpu_fits"} <= {name for _, name in MARKED}


@pytest.mark.parametrize(("page", "name"), MARKED)
def test_another_digit_in_a_table_is_told_and_mended(page, name):
    body = markdown.blocks(TEXTS[page])[name]
    *_, last = DIGIT.finditer(body.splitlines()[2])
    at = len("\n".join(body.splitlines()[:2])) + 1 + last.start()
    changed = body[:at] + str((int(body[at]) + 1) % 10) + body[at + 1 :]
    text = markdown.replaced(TEXTS[page], {name: changed})
    (said,) = tables.differences(TEXTS | {page: text}, [name])
    assert said.startswith(f"{page}: {name}: the page has ")
    assert markdown.replaced(text, tables.rebuilt([name])) == TEXTS[page]


@pytest.mark.parametrize("page", sorted(tables.phrases()))
def test_another_digit_in_a_sentence_is_told(page):
    for phrase in map(markdown.typeset, tables.phrases()[page]):
        *_, last = DIGIT.finditer(phrase)
        other = phrase[: last.start()] + "#" + phrase[last.end() :]
        text = " ".join(TEXTS[page].split()).replace(phrase, other)
        assert markdown.missing_phrases(text, [phrase])


@pytest.mark.parametrize("study", ["ptq_overtraining", "training_precision", "optimizer_states"])
def test_every_interval_that_a_page_quotes_is_of_a_table_or_a_phrase(study):
    own = [name for name in tables.TABLES if name.startswith(study)]
    made = tables.rebuilt(own)
    assert set(made) == set(own)
    page = f"docs/studies/{study}.md"
    known = markdown.intervals("\n".join([*made.values(), *_phrases(page)]))
    assert markdown.intervals(TEXTS[page]) <= known


def test_a_step_for_eight_gpus_is_what_its_compiler_said():
    """Eight H100s' records, added up anew: what each chip holds, multiplies and receives."""
    head, _, *body = tables.rebuilt(["train/gpu_fits"])["train/gpu_fits"].splitlines()
    cells = {
        name: figures for _, name, *figures, _ in ([c.strip() for c in x.split("|")] for x in body)
    }
    assert [c.strip() for c in head.split("|")[2:-1]] == ["bfloat16", "int8_train"]
    for i, name in enumerate(("bfloat16", "int8_train")):
        record = json.loads((RESULTS / f"compiled/gpu_h100_8_{name}.json").read_text())
        assert record["fits"]
        assert (record["topology"], record["config"]["recipe"]) == ("h100:8", name * i)
        held = sum(record["memory"].values()) / 2**30
        assert cells["all"][i].startswith(f"{held:.3f} of 74.5")
        received = sum(x["bytes"] for x in record["collectives"]) / 1e6
        shown = [row[i] for key, row in cells.items() if "MB" in "".join(row)]
        total, *parts = [float(x.split()[0].replace(",", "")) for x in shown if x]
        assert total == pytest.approx(received, abs=0.5)
        assert sum(parts) == pytest.approx(received, abs=0.05 * len(record["collectives"]))
        assert cells["share of operations in s8 × s8"][i] == ("82 %" if i else "0 %")
        assert cells["kernels a step"][i] == f"{record['kernels']['times']:,}"


def _phrases(page):
    return map(markdown.typeset, tables.phrases()[page])


def run(*names, check=False):
    """The binary, in this process; its exit status."""
    try:
        with mock.patch.object(tables, "FLAGS", types.SimpleNamespace(names=names, check=check)):
            tables.run(tables.Config())
    except SystemExit as done:
        return done.code
    return 0


def test_the_binary_mends_tables_and_prints_sentences(tmp_path, monkeypatch, capsys):
    for page, text in TEXTS.items():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(text)
    tables.differences(TEXTS)  # whatever is read lies in a cache, also where ROOT is another
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page, table, digit = tmp_path / "docs/tpu.md", "train/weak_scaling", "| 4 | 13.6 |"
    page.write_text(TEXTS["docs/tpu.md"].replace(digit, "| 4 | 13.7 |").replace("96 ms", "97 ms"))
    before = page.read_text()
    assert run(table, check=True) == 1
    assert 'the page has "| 4 | 13.7 |' in capsys.readouterr().out
    assert page.read_text() == before
    assert run(table) == 0
    assert run(check=True) == run() == 1
    assert "need 96 ms" in capsys.readouterr().out
    assert page.read_text() == TEXTS["docs/tpu.md"].replace("96 ms", "97 ms")


def test_markers_that_do_not_match_are_refused():
    begin, end = "<!-- table: a/b -->", "<!-- end of table -->"
    for text in (begin, end, f"{begin}\n{begin}\n{end}\n", f"{begin}\n{end}\n{begin}\n{end}\n"):
        with pytest.raises(ValueError, match="a name of its own"):
            markdown.blocks(text)
    with pytest.raises(ValueError, match=r"README\.md: each"):
        tables.differences({"README.md": begin})


def test_what_is_marked_has_records_and_what_has_records_is_marked():
    unknown = TEXTS | {"README.md": "<!-- table: a/b -->\n<!-- end of table -->\n"}
    assert "README.md: a/b: no table has this name" in tables.differences(unknown)
    assert "train/fits: no page has its marker" in tables.differences({}, ["train/fits"])
    with pytest.raises(ValueError, match="--names are of ptq_overtraining/exponents"):
        tables.rebuilt(["a/b"])
    with pytest.raises(ValueError, match="needs 2 cells"):
        markdown.to_markdown(["a", "b"], [["1"]])
    with pytest.raises(ValueError, match="has no rows"):
        markdown.to_markdown(["a", "b"], [])


# ---------------------------------------------------------------------------------------------------
# Tables of figures that are easy


def gap(task, schedule, arm, bits, gap, half=0.01):
    row = {"task": task, "schedule": schedule, "arm": arm, "bits": bits, "exact_sd": 0.001}
    return row | {"gap": gap, "low": gap - half, "high": gap + half}


def test_codecs_are_in_rows_from_the_widest():
    arms = (("fp32", 32), ("split1-4.3", 4.28), ("fixed-8", 8.27), ("torchao-4bit", 4.32))
    rows = [gap("language", "wsd", arm, bits, 0.004) | {"seeds": 4} for arm, bits in arms]
    body = state_tables.codecs({"gaps": rows}).splitlines()[2:]
    ends = "+0.0040 [−0.0060, +0.0140]"
    assert body == [
        f"| fixed, 8 | 8.27 | {ends} |",
        f"| torchao, 4 bits | 4.32 | {ends} |",
        f"| momentum + 1 bit, 4.3 | 4.28 | {ends} |",
    ]
    said = state_tables.codec_phrases({"gaps": rows})["experiments/README.md"]
    assert said == ["SD over 4 seeds is 0.0010"]


def _real(model, arm, seed=0):
    """A record of a model and arm, whose figures are easy."""
    low = {"smollm2": (2.0, 2.2), "vit": (0.79, 0.78, 0.80)}.get(model, ())
    figures = {
        "smollm2": {"bits_per_byte": {"reference": [1.0, 1.0], "quantized": list(low)}},
        "vit": {
            "accuracy": {"reference": 0.8, "quantized": low[seed] if seed < len(low) else 0.0},
            "report": {"kl": {"mean": {"estimate": 0.1}}},
        },
        "minilm": {
            "agreement": {},
            "report": {
                "judgments": {
                    "spearman_difference": {"estimate": 0.0011, "low": -0.0041, "high": 0.0063}
                }
            },
        },
    }[model]
    verdict = "fail" if "broken" in arm else "pass"
    return figures | {
        "trial": {"model": model, "arm": arm, "seed": seed},
        "bytes": {"before": 100_000_000, "after": 40_400_000 if model == "smollm2" else 48_123},
        "verdict": verdict,
        "few": {"verdict": verdict},
        "reasons": [],
    }


def test_changes_of_real_models_have_their_units():
    records = [
        _real(model, arm, seed)
        for model, arms in ARMS.items()
        for arm in arms
        for seed in (range(3) if model == "vit" else (0,))
    ]
    body = pretrained_tables.changes({"rows": rows_of(records)}).splitlines()[2:]
    _, low, high = t_interval(np.array([100.0, 120.0]))
    change = f"+110.0 % [{low:+.1f}, {high:+.1f}]"
    assert body[0] == f"| SmolLM2-135M, bits per byte | W3, round to nearest | {change} | pass |"
    assert body[1] == f"|  | searched, the same 40.4 MB | {change} | pass |"
    interval = "+0.0011 [−0.0041, +0.0063]"
    assert body[3] == f"|  | the same, one layer × 1.1 | {interval} | fail |"
    assert body[4].startswith(
        "| ViT on Fashion-MNIST, points, 3 seeds | W3, round to nearest | −1.00 ["
    )
    assert "points [" not in body[4]


# ---------------------------------------------------------------------------------------------------
# Summaries are what records give


def test_gaps_of_a_summary_are_those_of_its_records():
    """Everything but fits, which take minutes."""
    records = OPTIMIZER_STATES.load(RESULTS / "optimizer_states/law")
    rows = optimizer_states.gaps(optimizer_states.runs(records))
    assert_same_rows(rows, summary_of("optimizer_states/law")["gaps"], ("size", "steps", "arm"))


def test_exponents_of_a_summary_are_those_of_its_records():
    records = PTQ.load(RESULTS / "ptq_overtraining/full")
    added = ptq_overtraining.added_loss(records)
    rows = ptq_overtraining.rows_of(ptq_overtraining.growth(added))
    wanted = summary_of("ptq_overtraining/full")["headline"]["rows"]
    assert_same_rows(rows, wanted, ("size", "schedule"))


def assert_same_rows(found, wanted, keys):
    """The grid has an order of its own, other than that of records in a folder."""
    order = lambda rows: sorted(rows, key=lambda row: [row[key] for key in keys])  # noqa: E731
    assert_close(order(found), order(wanted))


PLACES = {
    "optimizer_states/law": (OPTIMIZER_STATES, pytest.mark.long),
    "ptq_overtraining/full": (PTQ, pytest.mark.release),
    "training_precision/generated": (TRAINING, pytest.mark.release),
    "training_precision/full": (TRAINING, pytest.mark.release),
}


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=marks) for place, (_, marks) in PLACES.items()]
)
def test_a_summary_is_what_its_records_give(place, tmp_path):
    """Where it is committed; intervals of bootstraps may differ by a part of their width."""
    if (wanted := summary_of(place)) is None:
        pytest.skip("its summary is not committed")
    workdir = shutil.copytree(RESULTS / place, tmp_path / "records")
    study, _ = PLACES[place]
    study.run(study.presets[place.rpartition("/")[2]], workdir)
    assert_close(json.loads((workdir / "summary.json").read_text()), wanted)


def assert_close(found, wanted, where="", slack=0.0):
    """Equal values, floats to a thousandth, an estimate and its ends to a fifth of the interval's width.

    Words are left out, since they quote figures.
    """
    if isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        low, high = wanted.get("low"), wanted.get("high")
        width = high - low if isinstance(low, float) and isinstance(high, float) else 0.0
        for key, value in wanted.items():
            slack = 0.2 * width if key in ("value", "low", "high") else 0.0
            assert_close(found[key], value, f"{where}/{key}", slack)
    elif isinstance(wanted, list):
        if not all(isinstance(one, str) for one in wanted):
            assert len(found) == len(wanted), where
            for i, one in enumerate(wanted):
                assert_close(found[i], one, f"{where}/{i}")
    elif isinstance(wanted, float) and found is not None:
        assert found == pytest.approx(wanted, rel=1e-3, abs=max(slack, 1e-6)), where
    elif not isinstance(wanted, str):
        assert found == wanted, where
