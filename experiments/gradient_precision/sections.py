"""The sections of the report."""

# pandas' selections are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportReturnType=false

from collections.abc import Iterable

import pandas as pd

from experiments.gradient_precision import figures, law_sections
from experiments.harness.reporting.layout import Figure, Section
from experiments.harness.reporting.statistics import CONFIDENCE
from experiments.harness.reporting.values import bounds, number

_ENDS = f"{CONFIDENCE:.0%} intervals over seeds"


def made(summary: dict, text: dict[str, list[str]]) -> list[Section]:
    """Those for which there are records, in their order."""
    found: list[Section | None] = [
        _gaps(summary, text),
        _recipes(summary, text),
        _rounding(summary, text),
        *law_sections.made(summary["laws"], text),
        _gradients(summary, text),
        _rates(summary["rates"]),
    ]
    return [section for section in found if section is not None]


def _shown(rows: Iterable[dict], columns: dict[str, str], value: str, form: str = "+.4f"):
    """Rows with their interval and their p- and q-values in words."""
    return pd.DataFrame(
        [
            {title: row[key] for key, title in columns.items()}
            | {value: bounds(row["mean"], row["low"], row["high"], form)}
            | {"p": number(row["p_value"], ".2g")}
            | ({"q": number(row["q_value"], ".2g")} if "q_value" in row else {})
            | {"seeds": row["seeds"]}
            for row in rows
        ]
    )


_PLACE = {"size": "N", "d_over_n": "D/N"}


def _gaps(summary: dict, text: dict[str, list[str]]) -> Section | None:
    rows = summary["gaps"]
    if not rows:
        return None
    columns = {**_PLACE, "name": "arm", "pair": "bits forward/backward", "peak_lr": "rate"}
    caption = f"Gaps to full precision in nats, {_ENDS}; q of all"
    tables = [(caption, _shown(rows, columns, "gap"))]
    folded = [("Full precision", pd.DataFrame(summary["full"]).rename(columns=_PLACE))]
    if summary["additivity"]:
        keys = {"name": "arm", "P_forward": "forward", "P_backward": "backward"}
        shown = _shown(summary["additivity"], keys, "gap of both less the sum of each alone")
        folded.append(("Whether gaps add up, in nats", shown))
    drawn = _known(figures.of_bits(rows))
    return Section("Gaps to full precision", text["Gaps"], (), drawn, [*tables, *folded])


def _recipes(summary: dict, text: dict[str, list[str]]) -> Section | None:
    tables = []
    if summary["order"]:
        columns = {**_PLACE, "first": "better", "second": "than"}
        tables.append((f"By how much, in nats, {_ENDS}", _shown(summary["order"], columns, "by")))
    if summary["parts"]:
        columns = {**_PLACE, "part": "part"}
        caption = f"What each part of nvfp4_train earns, in nats, {_ENDS}"
        tables.insert(0, (caption, _shown(summary["parts"], columns, "earns")))
    drawn = _known(figures.of_recipes(summary["gaps"]))
    return Section("Recipes", text["Recipes"], tables, drawn) if tables or drawn else None


def _known(figure: Figure | None) -> list[Figure]:
    return [figure] if figure is not None else []


def _rounding(summary: dict, text: dict[str, list[str]]) -> Section | None:
    rows = summary["roundings"]
    if not rows:
        return None
    columns = {"size": "N", "method": "grid", "pair": "bits", "first": "from", "second": "to"}
    caption = f"Change of loss in nats, means over lengths, {_ENDS}; q of all"
    shown = _shown(rows, columns, "change")
    return Section("Rounding and rotation of gradients", text["Rounding"], [(caption, shown)])


def _gradients(summary: dict, text: dict[str, list[str]]) -> Section | None:
    rows = summary["gaps"]
    if not rows:
        return None
    measures = ("bias", "least_bias", "variance", "forward")
    shown = pd.DataFrame(
        [
            {"N": r["size"], "D/N": r["d_over_n"], "arm": r["name"], "bits": r["pair"]}
            | {x.replace("_", " "): number(r[x], ".3g") for x in measures}
            | {"gap": bounds(r["mean"], r["low"], r["high"], "+.4f")}
            for r in rows
        ]
    )
    folded = [("Means over seeds, beside the loss gap in nats", shown)]
    tables = []
    if summary["noise"]:
        columns = {**_PLACE, "of": "of", "measure": "with", "arms": "arms"}
        caption = f"Rank correlation of the gap over arms, {_ENDS}"
        tables.append((caption, _shown(summary["noise"], columns, "Spearman's ρ", "+.2f")))
    if summary["noise_weights"]:
        caption = "gap = a · bias² + b · variance, arms of full forward precision, in nats"
        shown = _shown(summary["noise_weights"], {"size": "N", "of": "of"}, "weight", ".3g")
        tables.append((caption, shown))
    drawn = _known(figures.of_noise(rows))
    return Section("Bias and variance of gradients", text["Gradients"], tables, drawn, folded)


def _rates(rows: list[dict]) -> Section | None:
    if not rows:
        return None
    keys = ["size", "name", "pair", "d_over_n"]
    shown = pd.DataFrame(rows).pivot_table(index=keys, columns="peak_lr", values="loss", sort=False)
    shown = shown[sorted(shown.columns)].rename(columns=lambda r: f"{r:g}").map(number)
    shown = shown.reset_index().rename(columns={**_PLACE, "name": "arm", "pair": "bits"})
    return Section(
        "Learning rates", folded=[("Loss by peak learning rate, means over seeds", shown)]
    )
