"""The report: ratios in words, tables and a figure."""

# Altair's layers are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

from pathlib import Path

import altair as alt
import pandas as pd

from experiments.benchmark.optimizers import COMPARISONS, EXACT, MATRIX, OURS, STEP, TREE
from experiments.benchmark.serving import DECODE, FORWARD
from experiments.benchmark.variants import BASELINE
from experiments.harness.reporting import findings as said
from experiments.harness.reporting import prose, report
from experiments.harness.reporting.charts import Scale, facets, with_intervals
from experiments.harness.reporting.findings import UNRESOLVED, Finding
from experiments.harness.reporting.layout import Figure, Report, Section
from experiments.harness.reporting.provenance import Source
from experiments.harness.reporting.values import bounds, listed
from experiments.harness.running.timing import LEVEL

API_NAMES = {"linen": "Linen", "nnx": "NNX"}
_PART_NAMES = {FORWARD: "forward pass", DECODE: "one token"}
_PERCENT = f"{LEVEL:.0%}".replace("%", " %")
_NO_PEERS = (
    "The peers were switched off (config.peers=False), so nothing here is held against them."
)


def findings(result: dict) -> list[Finding]:
    """The ratios that the benchmark is for, each within its rounds."""
    found = [
        _faster(_STEPS, f"{row['ours']} over {row['peer']}, {API_NAMES[row['api']]}", row)
        for row in result["rivals"]
    ]
    for pair in result["serving_pairs"]:
        quantity = f"{pair['ours']} over {pair['other']} ({_PART_NAMES[pair['part']]})"
        found.append(_faster(_SERVES, quantity, pair))
    for pair in result["optimizer_pairs"]:
        found.append(_faster(_OPTIMIZES, f"{OURS} over {pair['other']} ({pair['contest']})", pair))
    return found


_STEPS = "Is a train step shorter with jaxquant than with the peer?"
_SERVES = "Is serving faster with jaxquant?"
_OPTIMIZES = "Is an optimizer's step shorter with jaxquant's state?"


def _faster(question: str, quantity: str, row: dict) -> Finding:
    """Whether a ratio of times lies below one."""
    answer = UNRESOLVED
    if row["low"] is not None:
        answer = "yes" if row["high"] < 1 else "no" if row["low"] > 1 else UNRESOLVED
    values = (row[k] for k in ("median", "low", "high"))
    return Finding(question, quantity, answer, *values, "of its time", null=1.0)


def _status(result: dict) -> list[str]:
    """What cannot be compared, what is not finite, and which intervals there are."""
    config, said = result["config"], []
    for row in [*result["steps"], *result["serving"]]:
        if row["deviation"]:
            said.append(f"Not comparable: {_named(row)} ({row['deviation']}).")
    broken = [_named(r) for r in result["steps"] if r["loss"] is None]
    said += [f"The loss is not finite: {', '.join(broken)}."] if broken else []
    broken = [_named(r) for r in result["serving"] if r["error"] is None]
    said += [f"Logits are not finite: {', '.join(broken)}."] if broken else []
    parts = {"steps": "rounds", "serving": "serve_rounds", "optimizers": "optim_rounds"}
    few = sorted({config[rounds] for part, rounds in parts.items() if result[part]})
    said += [
        f"{rounds} rounds are too few for an interval at {_PERCENT}, which takes 5."
        for rounds in few
        if rounds < 5
    ]
    return said if config["peers"] else [*said, _NO_PEERS]


def _named(row: dict) -> str:
    return f"{row['variant']} in {API_NAMES[row['api']]}" if "api" in row else row["variant"]


def _ratio(row: dict) -> str:
    return bounds(row["median"], row["low"], row["high"], ".2f")


def to_text(result: dict) -> str:
    """The finding and the tables for a terminal."""
    tables = [_step_table(result), _rival_table(result), _pass_table(result)]
    tables += [_serving_table(result, part) for part in _PART_NAMES]
    tables += [_optimizer_table(result, contest) for contest in COMPARISONS]
    shown = [table.to_string(index=False) for table in tables if not table.empty]
    return "\n\n".join([said.to_text(findings(result), _status(result)), *shown])


def _step_table(result: dict) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "API": API_NAMES[row["api"]],
                "variant": row["variant"],
                f"ratio to {BASELINE}": _ratio(row),
                "scales (activations / weights)": row["scales"],
                "int8 products": row["products"]["int8"],
                "temporaries (MB)": _megabytes(row["temporaries"]),
                "arguments (MB)": _megabytes(row["arguments"]),
                "loss": "not finite" if row["loss"] is None else f"{row['loss']:.4f}",
            }
            for row in result["steps"]
        ]
    )


def _megabytes(count: int | None) -> str:
    return "—" if count is None else f"{count / 1e6:.1f}"


def _rival_table(result: dict) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "API": API_NAMES[row["api"]],
                "ours": row["ours"],
                "peer": row["peer"],
                "ratio": _ratio(row),
            }
            for row in result["rivals"]
        ]
    )


def _pass_table(result: dict) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"program": row["program"], f"ratio to {result['passes'][0]['program']}": _ratio(row)}
            for row in result["passes"][1:]
        ]
    )


def _serving_table(result: dict, part: str) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                _PART_NAMES[part]: row["variant"],
                f"ratio to {BASELINE}": _ratio(row),
                "scales (activations / weights)": row["scales"],
                "int8 products": row["products"]["int8"],
                "arguments (MB)": _megabytes(row["arguments"]),
                "temporaries (MB)": _megabytes(row["temporaries"]),
                "error of logits": "not finite" if row["error"] is None else f"{row['error']:.4f}",
            }
            for row in result["serving"]
            if row["part"] == part
        ]
    )


def _optimizer_table(result: dict, contest: str) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                contest: row["variant"],
                f"ratio to {EXACT}": _ratio(row),
                "bytes of state": f"{row['bytes']:,}",
                "bits a number": f"{8 * row['bytes'] / (2 * row['elements']):.2f}",
            }
            for row in result["optimizers"]
            if row["contest"] == contest
        ]
    )


def write(workdir: Path, result: dict, source: Source | None = None) -> None:
    """Writes summary, report and figure; the summary is the result without the raw seconds."""
    summary = dict(result)
    for key in ("steps", "passes", "serving", "optimizers"):
        summary[key] = [{k: v for k, v in row.items() if k != "seconds"} for row in result[key]]
    sections = _sections(result, prose.read(__file__))
    title, status = "Side by side with the peers", _status(result)
    report.write(workdir, Report(title, findings(result), sections, summary, status, source))


def _sections(result: dict, text: dict[str, list[str]]) -> list[Section]:
    training = _training_sections(result, text) if result["steps"] else []
    serving = _serving_sections(result, text["Serving"]) if result["serving"] else []
    optimizers = _optimizer_sections(result, text["Optimizers"]) if result["optimizers"] else []
    return [*training, *serving, *optimizers, _method(result, text["Measured"])]


def _optimizer_sections(result: dict, text: list[str]) -> list[Section]:
    config = result["config"]
    names = {
        MATRIX: f"One step on a matrix of {config['optim_rows']} × {config['optim_columns']}",
        TREE: "One step on the parameters of the model below",
        STEP: "A whole train step of that model, on 16 sequences of 128 tokens",
    }
    tables = [(names[contest], _optimizer_table(result, contest)) for contest in COMPARISONS]
    return [Section("Optimizer state", text, folded=tables)]


def _serving_sections(result: dict, text: list[str]) -> list[Section]:
    config = result["config"]
    setting = (
        f"Forward passes of {config['serve_batch']} sequences of {config['tokens']} tokens through the "
        f"model below; one token of batch 1 through one of {config['decode_layers']} layers and width "
        f"{config['decode_width']}."
    )
    tables = [
        (f"Time of a {_PART_NAMES[FORWARD]}, and memory", _serving_table(result, FORWARD)),
        (f"Time of {_PART_NAMES[DECODE]}, and memory", _serving_table(result, DECODE)),
    ]
    return [Section("Serving", [setting, *text], folded=tables)]


def _training_sections(result: dict, text: dict[str, list[str]]) -> list[Section]:
    size = result["config"]["matrix"]
    steps = Section(
        "The step beside float32's",
        text["Steps"],
        figures=[_figure(result["steps"])],
        folded=[
            ("Time of a train step, memory, and the loss after the last round", _step_table(result))
        ],
    )
    rivals = Section(
        "Beside the peers",
        text["Peers"] if result["rivals"] else [_NO_PEERS],
    )
    passes = Section(
        "fake_quant beside one pass over memory",
        [
            f"Of {size} × {size} float32 values on the int8 grid, one scale per channel along the axis "
            "named, against a multiplication by a scalar. Each reads the matrix and writes a new one."
        ],
        [("Time of fake_quant", _pass_table(result))],
    )
    return [steps, rivals, passes]


def _method(result: dict, text: list[str]) -> Section:
    config, machine = result["config"], result["machine"]
    setting = (
        f"Model: {config['layers']} layers, width {config['width']}, {config['heads']} heads, "
        f"{result['linears']} linear layers; {config['batch']} sequences of {config['tokens']} random "
        f"tokens (seed {config['seed']}), the same in every step; AdamW, state donated."
    )
    where = (
        f"Machine: {machine['cpu']}, {machine['cores']} cores; device {machine['device']}; "
        f"{machine['system']}."
    )
    return Section(
        "How this was measured", [*text, setting, where, f"Versions: {listed(result['versions'])}."]
    )


def _figure(rows: list[dict]) -> Figure:
    table = pd.DataFrame(rows)[["api", "variant", "library", "median", "low", "high"]]
    ends = pd.concat([table["median"], table["low"], table["high"], pd.Series([1.0])]).dropna()
    # Every layer names the scale: one that does not would widen the axis to zero.
    domain = [float(ends.min()) * 0.95, float(ends.max()) * 1.05]
    axis_scale = alt.Scale(domain=domain, nice=False, zero=False)
    scale = Scale.of("library", table["library"])

    def draw(own: pd.DataFrame) -> alt.LayerChart:
        drawn = with_intervals(
            own,
            "median",
            f"ratio to {BASELINE}",
            is_across=True,
            scale=axis_scale,
            tooltip=["variant:N", "median:Q", "low:Q", "high:Q"],
            y=alt.Y("variant:N", title=None, sort=None, axis=alt.Axis(labelLimit=220)),
            color=scale.of_field("library"),
        )
        baseline = alt.Chart(pd.DataFrame({"one": [1.0]})).mark_rule(strokeDash=[6, 4])
        return alt.layer(drawn, baseline.encode(x=alt.X("one:Q", scale=axis_scale)))

    return Figure(
        "ratios",
        f"Time of a train step as a ratio to {BASELINE}'s",
        f"A dot is the median over rounds, the bar its {_PERCENT} interval; dashed: as long as "
        f"{BASELINE} takes. Left of it is faster.",
        facets(table, "api", draw, lambda api: API_NAMES[api]),
        [scale],
    )
