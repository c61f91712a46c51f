"""The tables of this study in the pages, and what they say of it in sentences."""

from experiments.harness.reporting.law_tables import interval
from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.harness.reporting.values import bounds
from experiments.ptq_overtraining.analysis import HEADLINE, KUMAR_EXPONENT, SCHEDULE_NAMES
from jaxquant import laws

_RECORDS = "ptq_overtraining/full/summary.json"
_RATES = "ptq_overtraining/rates/summary.json"
_EXPONENTS = {"gamma_D": "γ_D", "gamma_N": "γ_N", "gamma_post": "γ_post"}


def exponents(summary: dict) -> str:
    """γ_D of each size and schedule, at 4 bits per tensor."""
    found = _by_size(summary)
    schedules = _schedules(summary)
    head = ["N", *(f"γ_D under {SCHEDULE_NAMES[s]}" for s in schedules)]
    return to_markdown(head, [[n, *(row[s] for s in schedules)] for n, row in found.items()])


def _by_size(summary: dict) -> dict[str, dict[str, str]]:
    """γ_D with its interval, by size and schedule."""
    found: dict[str, dict[str, str]] = {}
    for row in summary["headline"]["rows"]:
        value = bounds(row["gamma"], row["low"], row["high"], ".2f")
        found.setdefault(row["size"], {})[row["schedule"]] = value
    return found


def _schedules(summary: dict) -> list[str]:
    given = {row["schedule"] for row in summary["headline"]["rows"]}
    return [schedule for schedule in SCHEDULE_NAMES if schedule in given]


def one_law(summary: dict) -> str:
    """Kumar's law of all sizes, lengths and widths, scales per tensor, beside what was published."""
    rows = [
        [SCHEDULE_NAMES[schedule], *(interval(fit[name], ".2f") for name in _EXPONENTS)]
        for schedule, fit in _fits(summary).items()
    ]
    published = [f"{laws.KUMAR_2024_PTQ.params[name]:.3f}" for name in _EXPONENTS]
    rows.append(["Kumar et al. (GPTQ, 30M to 220M)", *published])
    return to_markdown(["schedule", *_EXPONENTS.values()], rows)


def _per_tensor(summary: dict) -> dict[str, dict]:
    """What was found with scales per tensor, by schedule."""
    found = {o["schedule"]: o for o in summary["laws"] if o["granularity"] == "tensor"}
    return {schedule: found[schedule] for schedule in _schedules(summary)}


def _fits(summary: dict) -> dict[str, dict[str, dict]]:
    """Its parameters by name."""
    return {
        schedule: {p["name"]: p for p in one["fit"]["parameters"]}
        for schedule, one in _per_tensor(summary).items()
    }


def phrases(summary: dict) -> dict[str, list[str]]:
    """The exponents in sentences."""
    of_law = {s: interval(fit["gamma_D"], ".2f") for s, fit in _fits(summary).items()}
    wsd, cosine = (f"{of_law[s]} under {SCHEDULE_NAMES[s]}" for s in ("wsd", "cosine"))
    published = f"(published: {KUMAR_EXPONENT:.3f})"
    sizes = [
        f"{size} {row['wsd']} under WSD and {row['cosine']} under cosine"
        if i == 0
        else f"{size} {row['wsd']} and {row['cosine']}"
        for i, (size, row) in enumerate(_by_size(summary).items())
    ]
    trials = f"{summary['trials']['finished']} trials, 3 seeds"
    once = f"on text seen at most once {_interaction(summary, 'once')}"
    one = f"log D × log N is {_interaction(summary)}; {once}"
    below = f"Below one pass over the text the slope is {_below_one_pass(summary)}"
    return {
        "README.md": [f"γ = {wsd}, {cosine} {published}", trials],
        "docs/studies/index.md": [f"γ = {wsd} and {cosine} {published}", trials],
        "docs/studies/ptq_overtraining.md": [trials, _held_out(summary), one, below],
        "experiments/README.md": [*sizes, trials, _held_out(summary), one, below],
    }


def _interaction(summary: dict, of: str = "") -> str:
    """How γ_D changes with N, of each schedule: over all runs, or those that saw no text twice."""
    found = []
    for one in summary["one_exponent"]:
        row = (one[of] if of else one)["interaction"]
        found.append(f"{interval(row, '.2f')} under {SCHEDULE_NAMES[one['schedule']]}")
    return " and ".join(found)


def _below_one_pass(summary: dict) -> str:
    rows = [r for r in summary["passes"]["rows"] if (r["size"], r["part"]) == ("all", "below")]
    return " and ".join(
        f"{bounds(r['mean'], r['low'], r['high'], '.2f')} under {SCHEDULE_NAMES[r['schedule']]}"
        for r in rows
    )


def _held_out(summary: dict) -> str:
    """R² of Kumar's law on what it was not fitted to, over both schedules."""
    found = [
        value
        for one in _per_tensor(summary).values()
        for row in one["laws"]
        if row["law"] == laws.KUMAR_PTQ.name
        for key, value in row.items()
        if key.startswith("r2_by_")
    ]
    return f"R² held out by N, D and P of {min(found):.2f} to {max(found):.2f}"


# ---------------------------------------------------------------------------------------------------
# Repeated text

_REPETITION = "ptq_overtraining/repetition/summary.json"


def repetition(summary: dict) -> str:
    """γ_D at 4 bits per tensor on each text, and less that on the first one, in pairs of one seed."""
    changes = {r["text"]: r for r in summary["differences"] if _is_headline(r)}
    rows = []
    for row in filter(_is_headline, summary["exponents"]):
        cells = [row["text"], f"{row['passes'][1]:.1f}"]
        cells.append(bounds(row["gamma"], row["low"], row["high"], ".2f"))
        change = changes.get(row["text"])
        if change is None:
            rows.append([*cells, "", ""])
            continue
        less = bounds(change["mean"], change["low"], change["high"], "+.2f")
        rows.append([*cells, less, f"{change['p_value']:.2f}, {change['q_value']:.2f}"])
    head = ["text", "passes at D/N 600", "γ_D", "less the whole text's", "p, q"]
    return to_markdown(head, rows)


def _is_headline(row: dict) -> bool:
    return row["bits"] == HEADLINE["bits"] and row["granularity"] == "tensor"


def rates(summary: dict) -> str:
    """γ_D at the learning rate of least loss, and the range over the others that were tried."""
    rows = []
    for row in (r for r in summary["rates"] if r["is_best"]):
        place = row["size"], row["schedule"]
        others = [
            r["gamma"]
            for r in summary["rates"]
            if (r["size"], r["schedule"]) == place and not r["is_best"]
        ]
        cells = [row["size"], SCHEDULE_NAMES[row["schedule"]], f"{row['peak_lr']:g}"]
        cells.append(bounds(row["gamma"], row["low"], row["high"], ".2f"))
        rows.append([*cells, f"{min(others):.2f} to {max(others):.2f}"])
    return to_markdown(["N", "schedule", "best rate", "γ_D", "at the other rates"], rows)


TABLES = {
    "ptq_overtraining/exponents": Table(_RECORDS, exponents),
    "ptq_overtraining/one_law": Table(_RECORDS, one_law),
    "ptq_overtraining/rates": Table(_RATES, rates),
    "ptq_overtraining/repetition": Table(_REPETITION, repetition),
}
PHRASES = (Phrases(_RECORDS, phrases),)
