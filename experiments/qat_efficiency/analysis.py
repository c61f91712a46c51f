"""What the records say: tables, paired differences with intervals, answers, the summary."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.harness.reporting.statistics import CONFIDENCE, corrected, t_half_width, t_p_value
from experiments.harness.reporting.values import rows_of, versions_of
from experiments.qat_efficiency.stages import Arm
from experiments.qat_efficiency.tasks import PRIMARY, SUFFIXES, parse_width

FEWEST_SEEDS = 3  # for an interval over seeds; below, intervals are over examples
LOW_BITS = 4
METRIC_NAMES = {"accuracy": "accuracy", "nll": "NLL (nats)"}
MAIN_TEXT = "valid"
KEYS = ["model", "family", "method", "setting", "group", "activations", "width", "arm"]


def arms(records: list[dict]) -> pd.DataFrame:
    """One row for each arm of each trial, on the model's main split.

    Differences are to the reference of the same seed; ``d_*_se`` are standard errors over examples.
    """
    rows = []
    for record in records:
        task = record["trial"]["task"]
        for arm in record["arms"]:
            row = _identity(record, arm) | {"status": arm["status"]}
            row["rate"] = arm.get("rate")
            row["bytes"] = arm["bytes"]["total"] if "bytes" in arm else None
            row["bit_operations"] = record["derived"][arm["width"]]["bit_operations"]
            if arm["status"] == "done":
                row |= _figures(arm, next(iter(arm["splits"].values())), task["model"])
            rows.append(row)
    return pd.DataFrame(rows, columns=_COLUMNS).astype(dict.fromkeys(_NUMBERS, float))


_NUMBERS = [
    *("bytes", "bit_operations", "accuracy", "nll", "ece", "brier", "d_accuracy", "d_accuracy_se"),
    *("d_nll", "d_nll_se", "lost", "gained", "flip_rate", "mcnemar_p", "agreement", "kl", "kl_p99"),
    *("worst_change", "chosen_by", "mce", "rate"),
]
_COLUMNS = [*KEYS, "seed", "status", *_NUMBERS, "worst_group", "gate", "silent"]


def _identity(record: dict, arm: dict) -> dict:
    named = Arm(**{field.name: arm[field.name] for field in dataclasses.fields(Arm)})
    return {
        "model": record["trial"]["task"]["model"],
        "seed": record["trial"]["seed"],
        "family": named.family,
        "method": named.method,
        "setting": named.setting,
        "group": named.group,
        "activations": named.activations,
        "width": named.width,
        "arm": named.name,
    }


def _figures(arm: dict, main: dict, model: str) -> dict:
    accuracy, nll, flips = (
        main[k] for k in ("accuracy_difference", "log_perplexity_ratio", "flips")
    )
    worst = main["worst_group"] or {"name": None, "change": None}
    return {
        **main["quantized"],
        "d_accuracy": accuracy["estimate"],
        "d_accuracy_se": accuracy["se"],
        "d_nll": nll["estimate"],
        "d_nll_se": nll["se"],
        "lost": flips["lost"],
        "gained": flips["gained"],
        "flip_rate": flips["rate"],
        "mcnemar_p": flips["p_value"],
        "agreement": main["agreement"],
        "kl": main["kl"]["mean"],
        "kl_p99": main["kl"]["p99"],
        "worst_group": worst["name"],
        "worst_change": worst["change"],
        "gate": main["gate"],
        "silent": tuple(main["silent_regressions"]),
        "chosen_by": arm["selection"][PRIMARY[model][0]],
        "mce": (arm["corruption"] or {"mean": None})["mean"],
    }


def elsewhere(records: list[dict]) -> pd.DataFrame:
    """Away from the main split: columns where, kind, value and se.

    Kind "corruption": the errors over the reference's, for each corruption.  Kind "text": the NLL less
    the reference's, for each split.
    """
    rows = []
    for record in records:
        for arm in record["arms"]:
            if arm["status"] != "done":
                continue
            row = _identity(record, arm)
            for name, ratio in (arm["corruption"] or {"by_corruption": {}})[
                "by_corruption"
            ].items():
                rows.append(row | {"where": name, "kind": "corruption", "value": ratio, "se": None})
            for name, split in arm["splits"].items() if row["model"] == "language" else ():
                change = split["log_perplexity_ratio"]
                change = {"value": change["estimate"], "se": change["se"]}
                rows.append(row | {"where": name, "kind": "text"} | change)
    columns = [*KEYS, "seed", "where", "kind", "value", "se"]
    return pd.DataFrame(rows, columns=columns).astype({"value": float, "se": float})


def interval(values: Sequence[float], errors: Sequence[float | None]) -> dict:
    """The mean of one value for each seed with a 90 % interval.

    Three seeds or more: Student's t over seeds.  Fewer: normal, from the values' standard errors over
    examples, which says nothing of other seeds; None where one is not known.

    >>> interval([1.0, 2.0, 3.0], [None] * 3)["how"], interval([1.0], [0.5])["low"].__round__(2)
    ('seeds', 0.18)
    """
    n = len(values)
    mean = float(np.mean(values)) if n else None
    result: dict[str, Any] = {"mean": mean, "low": None, "high": None, "seeds": n, "how": "none"}
    if n >= FEWEST_SEEDS:
        scale = float(np.std(values, ddof=1)) / math.sqrt(n)
        half, how = t_half_width(scale, n - 1), "seeds"
    elif n and all(e is not None and math.isfinite(e) for e in errors):
        scale = math.sqrt(sum(e**2 for e in errors if e is not None)) / n
        half, how = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * scale, "examples"
    else:
        return result
    assert mean is not None
    return result | {"low": mean - half, "high": mean + half, "how": how}


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each arm: means over its seeds, and intervals of its differences to the reference."""
    rows = []
    for keys, group in table.groupby(KEYS, sort=False):
        done = group[group["status"] == "done"]
        row = dict(zip(KEYS, keys, strict=True)) | {"seeds": len(done), "runs": len(group)}
        row |= {name: _mean(group[name]) for name in ("bytes", "bit_operations")}
        for name in ("accuracy", "nll", "ece", "brier", "flip_rate", "kl", "mce", "worst_change"):
            row[name] = _mean(done[name])
        for name in ("d_accuracy", "d_nll"):
            found = interval(list(done[name]), list(done[f"{name}_se"]))
            row |= {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
            row["how"] = found["how"]
        row["mcnemar"] = int((done["mcnemar_p"] < 1 - CONFIDENCE).sum())
        row |= {f"gate_{s}": int((done["gate"] == s).sum()) for s in GATE}
        row["silent"] = _named(done["silent"])
        rows.append(row)
    return pd.DataFrame(rows)


GATE = ("pass", "inconclusive", "fail")


def _mean(values: pd.Series) -> float | None:
    known = values.dropna()
    return float(known.mean()) if len(known) else None


def _named(silent: pd.Series) -> dict[str, int]:
    """Groups that regressed silently, and in how many seeds."""
    counts: dict[str, int] = {}
    for groups in silent:
        for name in groups:
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def hidden(means: pd.DataFrame, away: pd.DataFrame) -> list[dict]:
    """Losses elsewhere that the main split does not show.

    Arms whose change on the main split has an interval that reaches zero or better, while elsewhere the
    interval lies wholly on the losing side.  ``p`` is of no change there, and ``q`` corrects it for all arms
    and places that are looked at.

    Args:
        means: of `over_seeds`.
        away: of `elsewhere`.
    """
    looks = []
    for row in means.to_dict("records"):
        metric, sign = PRIMARY[row["model"]]
        edges = [row[f"d_{metric}_{end}"] for end in ("low", "high")]
        if any(e is None or pd.isna(e) for e in edges) or max(sign * e for e in edges) < 0:
            continue
        found = select(away, model=row["model"], arm=row["arm"])
        looks += [
            {k: row[k] for k in KEYS} | {"where": where, "kind": kind} | _look(runs, kind)
            for (where, kind), runs in found.groupby(["where", "kind"], sort=False)
            if where != MAIN_TEXT  # which is the main split
        ]
    looks = [
        look | {"q": q}
        for look, q in zip(looks, corrected([look["p"] for look in looks]), strict=True)
    ]
    return [look for look in looks if look["low"] is not None and look["low"] > _KEPT[look["kind"]]]


# Errors are a ratio to the reference's, NLL is a difference.
_KEPT = {"corruption": 1.0, "text": 0.0}


def _look(runs: pd.DataFrame, kind: str) -> dict:
    values = [float(value) for value in runs["value"]]
    found = interval(values, [None if pd.isna(e) else e for e in runs["se"]])
    changes = [value - _KEPT[kind] for value in values]
    return found | {"p": t_p_value(changes) if found["how"] == "seeds" else None}


# ---------------------------------------------------------------------------------------------------
# Training against quantizing after training


def choose(table: pd.DataFrame, **of: Any) -> str | None:
    """The setting of a method that is best on the selection examples, on average over seeds.

    Only settings that came to an end in every seed are chosen from.

    Args:
        table: of `arms`.
        of: what is chosen among: a model and whatever else, as family, width, method, group.
    """
    sign = PRIMARY[of["model"]][1]
    best = None
    for setting, runs in select(table, **of).groupby("setting", sort=False):
        if (runs["status"] == "done").all():
            score = sign * float(runs["chosen_by"].mean())
            best = max(best, (score, setting), key=lambda x: x[0]) if best else (score, setting)
    return best[1] if best else None


def gain(table: pd.DataFrame, model: str, width: str, qat: str, ptq: str) -> dict:
    """What training in a setting gains over a setting after training, paired by seed, and its p-value.

    Positive is better, in the model's own metric.  With few seeds the standard errors of both are taken
    as independent, which is on the careful side where both err on the same examples; there is no p-value.
    """
    metric, sign = PRIMARY[model]
    runs = [
        select(
            table, model=model, width=width, family=family, setting=name, status="done"
        ).set_index("seed")
        for family, name in (("qat", qat), ("ptq", ptq))
    ]
    seeds = [seed for seed in runs[0].index if seed in runs[1].index]
    values = [sign * float(runs[0].loc[s, metric] - runs[1].loc[s, metric]) for s in seeds]
    errors = [math.hypot(*(float(r.loc[s, f"d_{metric}_se"]) for r in runs)) for s in seeds]
    found = interval(values, errors)
    return found | {"p": t_p_value(values) if found["how"] == "seeds" else None}


def comparisons(table: pd.DataFrame) -> list[dict]:
    """What training gains over quantizing after training at each model and width: every question put.

    ``scope`` says what both settings are chosen from, on the selection examples:

    - "best": all settings of either family;
    - "channel" and "g32": those whose weights have the same groups, where there are several;
    - an estimator's name: its settings, against the best after training.

    ``answer`` is "qat" where the gain's interval lies above zero, "ptq" where it lies below, and
    "unresolved" otherwise.  ``q`` corrects ``p`` for all rows at once; a row that repeats another's pair has
    that one's, and does not count again.
    """
    rows = [
        row
        for (model, width), group in table[table["family"] == "qat"].groupby(
            ["model", "width"], sort=False
        )
        for row in _of_width(table, group, {"model": model, "width": width})
    ]
    pairs = [(row["model"], row["width"], row["qat"], row["ptq"]) for row in rows]
    once = {pair: row["p"] for pair, row in zip(pairs, rows, strict=True)}
    adjusted = dict(zip(once, corrected(list(once.values())), strict=True))
    return [row | {"q": adjusted[pair]} for pair, row in zip(pairs, rows, strict=True)]


def _of_width(table: pd.DataFrame, trained: pd.DataFrame, where: dict) -> list[dict]:
    best = choose(table, family="ptq", **where)
    rows = [_compared(table, where, "best", choose(table, family="qat", **where), best)]
    groups = list(dict.fromkeys(trained["group"]))
    for group in groups if len(groups) > 1 else ():
        found = [choose(table, family=f, group=group, **where) for f in ("qat", "ptq")]
        rows.append(_compared(table, where, _group_name(group), *found))
    for method in dict.fromkeys(trained["method"]):
        found = choose(table, family="qat", method=method, **where)
        rows.append(_compared(table, where, method, found, best))
    return rows


def _group_name(group: int) -> str:
    return f"g{group}" if group else "channel"


def _compared(
    table: pd.DataFrame, where: dict, scope: str, qat: str | None, ptq: str | None
) -> dict:
    named = {"scope": scope, "bits": min(parse_width(where["width"])), "qat": qat, "ptq": ptq}
    if qat is None or ptq is None:
        unknown = {"rates": {}, "p": None, "answer": "unresolved"}
        return where | named | interval([], []) | unknown
    found = gain(table, **where, qat=qat, ptq=ptq)
    rates = select(table, family="qat", setting=qat, **where)["rate"].value_counts().sort_index()
    named["rates"] = {f"{rate:g}": int(count) for rate, count in rates.items()}
    return where | named | found | {"answer": _answer(found)}


def _answer(found: dict) -> str:
    if found["low"] is None:
        return "unresolved"
    return "qat" if found["low"] > 0 else "ptq" if found["high"] < 0 else "unresolved"


def gains(rows: list[dict]) -> pd.DataFrame:
    """Every estimator's gain over the best setting after training, at each width, of `comparisons`."""
    kept = [row | {"method": row["scope"]} for row in rows if row["scope"] in SUFFIXES]
    columns = ["model", "width", "ptq", "qat", "method", "mean", "low", "high", "seeds", "how"]
    table = pd.DataFrame(kept, columns=columns)
    return table[table["mean"].notna()]


def front(means: pd.DataFrame, model: str) -> set[str]:
    """The arms that no other arm matches with fewer bytes, or beats with as many (the Pareto front)."""
    metric, sign = PRIMARY[model]
    rows = select(means, model=model).dropna(subset=["bytes", metric])
    points = [(r["arm"], r["bytes"], sign * r[metric]) for r in rows.to_dict("records")]

    def beaten(size: float, good: float) -> bool:
        return any(b <= size and g >= good and (b < size or g > good) for _, b, g in points)

    return {name for name, size, good in points if not beaten(size, good)}


def select(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def summarize(records: list[dict], expected: int) -> dict:
    """What ``summary.json`` holds; it follows from the records alone, so that it holds no times."""
    table = arms(records)
    means = over_seeds(table) if len(table) else pd.DataFrame()
    diverged = [
        {"model": r["trial"]["task"]["model"], "seed": r["trial"]["seed"], "step": r["step"]}
        for r in records
        if r["status"] == "diverged"
    ]
    broken = table[table["status"] != "done"][["model", "seed", "arm", "status"]]
    derived = {r["trial"]["task"]["model"]: r["derived"] for r in records if r["arms"]}
    return {
        "study": "qat_efficiency",
        "trials": {"finished": len(records), "expected": expected, "diverged": diverged},
        "confidence": CONFIDENCE,
        "primary": {model: metric for model, (metric, _) in PRIMARY.items()},
        "comparisons": comparisons(table),
        "arms": rows_of(means),
        "pareto": {m: sorted(front(means, m)) for m in dict.fromkeys(table["model"])},
        "hidden": hidden(means, elsewhere(records)) if len(table) else [],
        "broken": rows_of(broken),
        "derived": derived,
        "reference_rates": {
            f"{r['trial']['task']['model']} seed {r['trial']['seed']}": r["reference_rate"]
            for r in records
            if r["arms"]
        },
        "versions": versions_of(records),
    }
