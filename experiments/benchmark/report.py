"""The report: ratios in words, tables and a figure."""

# Altair's layers are unions too wide for a type checker to follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

from pathlib import Path

import altair as alt
import pandas as pd

from experiments.benchmark.optimizers import COMPARISONS, EXACT, MATRIX, OURS, STEP, TREE
from experiments.benchmark.serving import DECODE, FORWARD
from experiments.benchmark.variants import BASELINE
from experiments.harness.reporting import report
from experiments.harness.running.timing import LEVEL

API_NAMES = {"linen": "Linen", "nnx": "NNX"}
_PART_NAMES = {FORWARD: "forward pass", DECODE: "one token"}
_PERCENT = f"{LEVEL:.0%}".replace("%", " %")
_NO_PEERS = (
    "The peers were switched off (config.peers=False), so nothing here is held against them."
)


def verdict(result: dict) -> str:
    """The ratios that the benchmark is for, in a few sentences."""
    said = [_steps_verdict(result) if result["steps"] else "", _serving_verdict(result)]
    said.append(_optimizer_verdict(result))
    said.append("" if result["config"]["peers"] else _NO_PEERS)
    return " ".join(text for text in said if text)


def _steps_verdict(result: dict) -> str:
    config, pairs = result["config"], {}
    for row in result["rivals"]:
        pair = f"{row['ours']} over {row['peer']}"
        pairs.setdefault(pair, []).append(f"{API_NAMES[row['api']]} {_ratio(row)}")
    parts = [f"{pair}: {', '.join(ratios)}" for pair, ratios in pairs.items()]
    against = (
        f"Ratios of step times, below 1 where ours takes less. {'; '.join(parts)}." if parts else ""
    )
    deviating = [row for row in result["steps"] if row["deviation"]]
    warning = " ".join(
        f"Not comparable: {row['variant']} in {API_NAMES[row['api']]} ({row['deviation']})."
        for row in deviating
    )
    broken = [
        f"{r['variant']} in {API_NAMES[r['api']]}" for r in result["steps"] if r["loss"] is None
    ]
    failed = f"The loss is not finite: {', '.join(broken)}." if broken else ""
    said = [against, warning, failed, _interval_note(config["rounds"])]
    return " ".join(text for text in said if text)


def _serving_verdict(result: dict) -> str:
    if not result["serving"]:
        return ""
    ratios = "; ".join(
        f"{pair['ours']} over {pair['other']} ({_PART_NAMES[pair['part']]}): {_ratio(pair)}"
        for pair in result["serving_pairs"]
    )
    deviating = [row for row in result["serving"] if row["deviation"]]
    warning = [f"Not comparable: {row['variant']} ({row['deviation']})." for row in deviating]
    broken = [row["variant"] for row in result["serving"] if row["error"] is None]
    failed = [f"Logits are not finite: {', '.join(broken)}."] if broken else []
    note = _interval_note(result["config"]["serve_rounds"])
    return " ".join([f"Ratios of serving times: {ratios}.", *warning, *failed, note])


def _optimizer_verdict(result: dict) -> str:
    if not result["optimizers"]:
        return ""
    parts = [
        f"{pair['other']} ({pair['contest']}): {_ratio(pair)}" for pair in result["optimizer_pairs"]
    ]
    note = _interval_note(result["config"]["optim_rounds"])
    return f"Ratios of optimizer times, {OURS} over {'; '.join(parts)}. {note}"


def _interval_note(rounds: int) -> str:
    few = f"{rounds} rounds are too few for an interval at {_PERCENT}, which takes 5."
    return f"Medians of {rounds} rounds with {_PERCENT} intervals." if rounds >= 5 else few


def _ratio(row: dict) -> str:
    interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['median']:.2f}{interval}"


def to_text(result: dict) -> str:
    """The finding and the tables for a terminal."""
    tables = [_step_table(result), _rival_table(result), _pass_table(result)]
    tables += [_serving_table(result, part) for part in _PART_NAMES]
    tables += [_optimizer_table(result, contest) for contest in COMPARISONS]
    shown = [table.to_string(index=False) for table in tables if not table.empty]
    return "\n\n".join([verdict(result), *shown])


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


def write(workdir: Path, result: dict) -> None:
    """Writes summary, report and figure; the summary is the result without the raw seconds."""
    summary = dict(result)
    for key in ("steps", "passes", "serving", "optimizers"):
        summary[key] = [{k: v for k, v in row.items() if k != "seconds"} for row in result[key]]
    report.write(
        workdir, "Side by side with the peers", verdict(result), _sections(result), summary
    )


def _sections(result: dict) -> list[report.Section]:
    training = _training_sections(result) if result["steps"] else []
    serving = _serving_sections(result) if result["serving"] else []
    optimizers = _optimizer_sections(result) if result["optimizers"] else []
    return [*training, *serving, *optimizers, _method(result)]


def _optimizer_sections(result: dict) -> list[report.Section]:
    config = result["config"]
    names = {
        MATRIX: f"One step on a matrix of {config['optim_rows']} × {config['optim_columns']}",
        TREE: "One step on the parameters of the model below",
        STEP: "A whole train step of that model, on 16 sequences of 128 tokens",
    }
    tables = [(names[contest], _optimizer_table(result, contest)) for contest in COMPARISONS]
    return [report.Section("Optimizer state", [_OPTIMIZERS], tables)]


def _serving_sections(result: dict) -> list[report.Section]:
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
    return [report.Section("Serving", [setting, _SERVING], tables)]


def _training_sections(result: dict) -> list[report.Section]:
    size = result["config"]["matrix"]
    steps = report.Section(
        "The step beside float32's",
        [_SETTING],
        [("Time of a train step, memory, and the loss after the last round", _step_table(result))],
        [_figure(result["steps"])],
    )
    rivals = report.Section(
        "Beside the peers",
        [_RIVALS if result["rivals"] else _NO_PEERS],
        [("Ours over the peer's", _rival_table(result))] if result["rivals"] else [],
    )
    passes = report.Section(
        "fake_quant beside one pass over memory",
        [
            f"Of {size} × {size} float32 values on the int8 grid, one scale per channel along the axis "
            "named, against a multiplication by a scalar. Each reads the matrix and writes a new one."
        ],
        [("Time of fake_quant", _pass_table(result))],
    )
    return [steps, rivals, passes]


_SETTING = (
    "Every quantized variant quantizes the same products: those of all linear layers in the blocks and "
    "of the head. Attention's own products and the embedding stay in floating point. Simulated variants "
    "multiply rounded values in floating point; the others multiply 8-bit integers, in the forward "
    "product alone or in both gradients too, which the column of int8 products tells: they were "
    "counted in each traced step. What shares a scale differs, and is each library's own default."
)
_RIVALS = (
    "Each pair quantizes the same products and ran in the same rounds. Qwix's QAT is not simulated: it "
    "multiplies 8-bit integers in the forward product, as w8a8 does, and takes its gradients in floating "
    "point from the operands as they were before rounding, where w8a8 takes them from the rounded ones. "
    "Simulated w8a8 stands beside it as what quantization-aware training costs without integer "
    "products. AQT exists for Linen alone, and rounds to nearest here as the others do."
)
_SERVING = (
    "All serve the same float32 parameters: as they are, in bfloat16 with bfloat16 parameters, frozen by "
    "jaxquant, or quantized after training by Qwix with its defaults. All of them are arguments of the "
    "compiled pass, so every variant reads its weights from memory. Scales of activations are found anew "
    "in each pass. The token is decoded without a cache, so that attention sees it alone and the time is "
    "that of the linears' matrix-vector products. The error of logits is ‖y − r‖ / ‖r‖ against float32's r, "
    "of an untrained model: a check that no variant is broken, not a measure of quality."
)
_OPTIMIZERS = (
    "AdamW with its update applied, state and parameters donated; bytes are those of all arrays of its "
    "state, bits a number those over two numbers a parameter. Codecs “in JAX” are ours, written after the "
    "peers' and compiled whole; the peers themselves, where config.torch_peers asked for them, run in torch "
    "on the same cores. Adaptive widths decide every 100 steps, which medians do not show."
)
_METHOD = (
    "Measured: all steps and passes were compiled and warmed up first; then, in one process, each round ran "
    "every variant once, in an order rotated from round to round, each timed until the device had finished. "
    "A ratio is taken within a round, to float32 of the same API; shown is its median, with the "
    f"sign test's {_PERCENT} interval, which supposes independent rounds and nothing else. Absolute "
    "times mean little on shared machines; benchmark.json has all of them. Temporaries and arguments are "
    "the compiler's own account. The loss is a check that no variant is broken, not a measure of quality."
)


def _method(result: dict) -> report.Section:
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
    listed = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return report.Section(
        "How this was measured", [_METHOD, setting, where, f"Versions: {listed}."]
    )


def _figure(rows: list[dict]) -> report.Figure:
    table = pd.DataFrame(rows)[["api", "variant", "library", "median", "low", "high"]]
    ends = pd.concat([table["median"], table["low"], table["high"], pd.Series([1.0])]).dropna()
    domain = [float(ends.min()) * 0.95, float(ends.max()) * 1.05]
    panels = [
        _panel(group.drop(columns="api"), domain).properties(title=API_NAMES[str(api)])
        for api, group in table.groupby("api", sort=False)
    ]
    return report.Figure(
        "ratios",
        f"Time of a train step as a ratio to {BASELINE}'s",
        f"A dot is the median over rounds, the bar its {_PERCENT} interval; dashed: as long as "
        f"{BASELINE} takes. Left of it is faster.",
        panels,
    )


def _panel(table: pd.DataFrame, domain: list[float]) -> alt.LayerChart:
    # Every layer names the scale: one that does not would widen the axis to zero.
    scale = alt.Scale(domain=domain, nice=False, zero=False)
    color = alt.Color("library:N", title="library", sort=None, legend=alt.Legend(columns=4))
    y = alt.Y("variant:N", title=None, sort=None, axis=alt.Axis(labelLimit=220))
    median = alt.X("median:Q", title=f"ratio to {BASELINE}", scale=scale)
    points = (
        alt.Chart(table)
        .mark_circle(size=60, opacity=1)
        .encode(x=median, y=y, color=color, tooltip=["variant:N", "median:Q", "low:Q", "high:Q"])
    )
    intervals = (
        alt.Chart(table.dropna())
        .mark_rule(strokeWidth=2)
        .encode(x=alt.X("low:Q", scale=scale), x2="high:Q", y=y, color=color)
    )
    baseline = alt.Chart(pd.DataFrame({"one": [1.0]})).mark_rule(strokeDash=[6, 4])
    return alt.layer(points, intervals, baseline.encode(x=alt.X("one:Q", scale=scale)))
