"""Weak scaling on paper: what a chip receives as chips and batch grow together, from compiled steps' records.

    python -m experiments.train.scaling --config.figure=weak_scaling.svg

Bytes and operations are the compiled programs'; the bound is *derived* from them and from published peak
rates, not a time: a step takes at least as long as its products at the chip's peak, and at least as long as
its bytes over the chip's links, one way, at theirs.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from experiments.harness.running import cli, files
from experiments.harness.training import chips
from experiments.train import aot_table


@dataclasses.dataclass
class Config:
    """The records, and the figure's file."""

    records: str = "experiments/results/compiled"
    pattern: str = "weak_*.json"
    figure: str = ""


def bounds(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Returns a row for each record: chips, bytes a chip receives, operations, and the bounds that follow.

    Columns: topology, chips, tokens (a step), received (bytes), compute (seconds at least), links (seconds at
    least), utilization (of the model's operations at the int8 peak, at most).

    Raises:
        ValueError: no record of a step that fits.
    """
    rows = []
    for record in records:
        if not record["fits"]:
            continue
        (chip,) = (c for c in chips.CHIPS.values() if c.name == record["chip"])
        received = sum(x["bytes"] for x in record["collectives"])
        compute = sum(_seconds(x, chip) for x in record["products"])
        links = received / (chip.link_rate / 2)
        needed = record["model_flops"] / record["devices"] / chip.peak["s8"]
        config = record["config"]
        rows.append(
            {
                "topology": record["topology"],
                "chips": record["devices"] // chip.cores,
                "tokens": config["batch"] * config["sequence"],
                "received": received,
                "compute": compute,
                "links": links,
                "utilization": needed / max(compute, links),
            }
        )
    if not rows:
        raise ValueError("no record of a compiled step that fits")
    return pd.DataFrame(rows).sort_values("chips", ignore_index=True)


def _seconds(product: dict[str, Any], chip: chips.Chip) -> float:
    """Returns seconds at the peak of the operands' type; mixed types run at bfloat16's."""
    kind = product["operands"][0] if len(set(product["operands"])) == 1 else "bf16"
    return product["flops"] / chip.peak.get(kind, chip.peak["bf16"])


def figure(records: Sequence[dict[str, Any]]) -> alt.Chart:
    """Returns bytes that a chip receives by collective, against chips."""
    rows = [
        {
            "chips": str(record["devices"]),
            "GB a chip receives in a step": x["bytes"] / 1e9,
            "collective": f"{x['kind']} of {x['types']}",
        }
        for record in sorted(records, key=lambda r: r["devices"])
        for x in record["collectives"]
        if x["bytes"] > 5e7
    ]
    order = list(dict.fromkeys(row["chips"] for row in rows))
    chart = alt.Chart(pd.DataFrame(rows), width=420, height=260).mark_bar()
    return chart.encode(
        x=alt.X("chips:N", sort=order, title="chips, one sequence of 2048 tokens on each"),
        y=alt.Y("sum(GB a chip receives in a step):Q", title="GB that a chip receives in a step"),
        color=alt.Color("collective:N", scale=alt.Scale(scheme="tableau10")),
    )


def main(config: Config) -> None:
    folder = Path(config.records)
    every = (files.read_json(path) for path in sorted(folder.glob(config.pattern)))
    found = [record for record in every if record is not None]
    if not found:
        raise ValueError(f"config.records holds nothing like {config.pattern!r}; got '{folder}'")
    rows = [
        (
            row["topology"],
            f"{row['chips']}",
            f"{row['received'] / 1e9:.2f}",
            f"{1e3 * row['compute']:.1f}",
            f"{1e3 * row['links']:.1f}",
            f"{row['utilization']:.0%}",
        )
        for row in bounds(found).to_dict("records")
    ]
    head = ("topology", "chips", "GB received", "products, ms ≥", "links, ms ≥", "utilization ≤")
    print(aot_table.table(head, rows))
    if config.figure:
        figure(found).save(config.figure)


if __name__ == "__main__":
    cli.main(main, {"compiled": Config()}, default="compiled")
