"""Whether one γ_D serves all sizes and widths: the interaction of D with N, and the exponent by width."""

# pandas' selections and groups are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import numpy as np
import pandas as pd

from experiments.harness.models import lm
from experiments.harness.reporting.exponents import resampled
from experiments.harness.reporting.findings import Finding
from experiments.harness.reporting.layout import Section
from experiments.harness.reporting.statistics import corrected, t_half_width, t_test
from experiments.harness.reporting.values import bounds
from experiments.ptq_overtraining import corrections
from experiments.ptq_overtraining.analysis import HEADLINE, SCHEDULE_NAMES, select

BOOTSTRAPS = 2000
_CERTAIN = 2.0  # standard errors, over the evaluation's windows, that what is added has to exceed
_QUESTION = "Does one γ_D hold for all sizes?"


def summaries(added: pd.DataFrame) -> list[dict]:
    """For each schedule the interaction of log D with log N over all widths, and γ_D of each width.

    Least squares on log δ of the blocks' linears, one scale per tensor, on text like the training text: a
    level for each width, log N, log D and (log N − mean) (log D − mean), whose coefficient is zero where one
    γ_D serves all sizes; and a level, log N and log D for each width alone.  Errors are of bootstraps over
    units of size and seed within sizes, set right for their few degrees of freedom, units − sizes.
    """
    own = select(added, scope="linears", split="valid", granularity=HEADLINE["granularity"])
    own = own[own["mean"] > _CERTAIN * own["se"]]
    return [
        {"schedule": schedule} | _summary(table)
        for schedule, table in own.groupby("schedule", sort=False)
        if len(set(table["size"])) > 1
    ]


def _summary(table: pd.DataFrame) -> dict:
    """All runs; and the interaction once more over those that saw no text twice.

    The smallest model sees the text about once and larger ones several times, so that size and repetition
    come together in all runs.
    """
    found = _estimates(table)
    fresh = table[table["epochs"] <= 1]
    if "interaction" in found and len(fresh) < len(table) and len(set(fresh["size"])) > 1:
        once = _estimates(fresh)
        if "interaction" in once:
            found["once"] = {k: once[k] for k in ("interaction", "points", "freedom")}
    return found


def _estimates(table: pd.DataFrame) -> dict:
    place = table.groupby(["size", "seed"], sort=False).ngroup().to_numpy()
    units = int(place.max()) + 1
    sizes = len(set(table["size"]))
    freedom = units - sizes
    found = {"points": len(table), "sizes": sizes, "freedom": freedom}
    if freedom < 1:
        return found | {"reason": "one seed alone of each size"}
    n = np.log([lm.SIZES[size].non_embedding_parameters for size in table["size"]])
    d, y = np.log(table["tokens"].to_numpy(float)), np.log(table["mean"].to_numpy(float))
    n, d = n - n.mean(), d - d.mean()
    bits = table["bits"].to_numpy()
    widths = np.unique(bits)
    levels = (bits[:, None] == widths).astype(float)
    weights = resampled(place, table["size"].to_numpy(), BOOTSTRAPS)
    together = _fits(np.column_stack([levels, n, d, n * d]), y, weights)
    interaction = _estimate(together[:, -1], units, freedom)
    each = [levels * x[:, None] for x in (np.ones(len(y)), n, d)]
    by_width = _fits(np.column_stack(each), y, weights)[:, -len(widths) :]
    return found | {"interaction": interaction, "widths": _widths(widths, by_width, units, freedom)}


def _fits(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Least squares of the runs as they are, and then of each bootstrap, float64[1 + bootstraps, columns]."""
    weights = np.concatenate([np.ones((1, len(y))), weights])
    normal = np.einsum("br,rk->bk", weights, (x[:, :, None] * x[:, None, :]).reshape(len(y), -1))
    right = weights @ (x * y[:, None])
    return np.einsum("bij,bj->bi", np.linalg.pinv(normal.reshape(-1, *x.shape[1:] * 2)), right)


def _estimate(drawn: np.ndarray, units: int, freedom: int) -> dict:
    """The first of the values with the interval and p-value that the scatter of the others gives it."""
    value = float(drawn[0])
    error = float(drawn[1:].std(ddof=1)) * (units / freedom) ** 0.5
    half = t_half_width(error, freedom)
    ends = {"value": value, "low": value - half, "high": value + half}
    return ends | {"p_value": t_test(value, error, freedom)}


def _widths(widths: np.ndarray, drawn: np.ndarray, units: int, freedom: int) -> list[dict]:
    """γ_D of each width, and its difference from that of the headline's width."""
    reference = HEADLINE["bits"]
    base = drawn[:, widths == reference]
    rows = []
    for i, bits in enumerate(widths.tolist()):
        row = {"bits": bits, "gamma": _estimate(drawn[:, i], units, freedom)}
        if bits != reference and base.size:
            row["difference"] = _estimate(drawn[:, i] - base[:, 0], units, freedom)
        rows.append(row)
    others = [row["difference"] for row in rows if "difference" in row]
    q_values = corrected([other["p_value"] for other in others])
    for other, q in zip(others, q_values, strict=True):
        other["q_value"] = q
    return rows


def findings(found: list[dict]) -> list[Finding]:
    """Whether the exponent changes with size: the interaction's sign, corrected over the schedules."""
    return [_finding(*test) for test in _tests(found)]


def _tests(found: list[dict]) -> list[tuple[str, dict, float | None, str]]:
    """(where, interaction with its points and freedom, q-value, note) of all runs, and of fresh text."""
    tests = []
    for one in found:
        schedule = SCHEDULE_NAMES[one["schedule"]]
        if "interaction" in one:
            widths = ", ".join(
                f"{w['gamma']['value']:.2f} at {w['bits']} bits" for w in one["widths"]
            )
            tests.append((schedule, one, f"γ_D by width: {widths}"))
        if "once" in one:
            tests.append((f"{schedule}, text seen at most once", one["once"], ""))
    q_values = corrected([one["interaction"]["p_value"] for _, one, _ in tests])
    return [(where, one, q, note) for (where, one, note), q in zip(tests, q_values, strict=True)]


def _finding(where: str, one: dict, q: float | None, said: str) -> Finding:
    value, low, high = (one["interaction"][k] for k in ("value", "low", "high"))
    return Finding(
        _QUESTION,
        f"log D × log N, {where}",
        corrections.sign(value, q, "no, it rises with N", "no, it falls with N"),
        *(value, low, high),
        least_effect=(high - low) / 2,
        note="; ".join(filter(None, [f"q {corrections.q_text(q)}", said])),
    )


def section(found: list[dict], paragraphs: list[str]) -> Section:
    """The check as a section of the report."""
    said = list(paragraphs)
    for one in found:
        if "reason" in one:
            said.append(f"{SCHEDULE_NAMES[one['schedule']]}: no interval: {one['reason']}.")
    whole = [one for one in found if "interaction" in one]
    interactions = pd.DataFrame(
        [
            {
                "schedule": where,
                "log D × log N [90 %]": _bounds(one["interaction"]),
                "p": corrections.q_text(one["interaction"]["p_value"]),
                "q": corrections.q_text(q),
                "points": one["points"],
                "degrees of freedom": one["freedom"],
            }
            for where, one, q, _ in _tests(found)
        ]
    )
    by_width = pd.DataFrame([_width_row(one, row) for one in whole for row in one["widths"]])
    tables = [("What an e-fold of N adds to γ_D, over all widths", interactions)]
    folded = [("γ_D of each width, over all sizes [90 %]", by_width)]
    if not whole:
        return Section(_TITLE, said)
    return Section(_TITLE, said, tables, folded=folded)


_TITLE = "One exponent for all sizes?"


def _width_row(one: dict, row: dict) -> dict:
    shown = {"schedule": SCHEDULE_NAMES[one["schedule"]], "bits": row["bits"]}
    shown |= {"γ_D": _bounds(row["gamma"])}
    other = row.get("difference")
    if other is None:
        return shown | dict.fromkeys(("less that of 4 bits", "p", "q"), "—")
    shown |= {"less that of 4 bits": _bounds(other)}
    return shown | {
        "p": corrections.q_text(other["p_value"]),
        "q": corrections.q_text(other["q_value"]),
    }


def _bounds(row: dict) -> str:
    return bounds(row["value"], row["low"], row["high"], ".2f")
