"""The tables of compiled steps in docs/tpu.md and docs/gpu.md."""

from typing import Any

from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.train import scaling

_GIB, _MIB = 2**30, 2**20
_PHASES = ("forward", "dgrad", "wgrad")


def fits(records: list[dict[str, Any]]) -> str:
    """Memory, operand types and exchanged bytes of a device, for each model and mesh that was compiled."""
    head = (
        *("model (N)", "chips", "arguments", "temporaries", "of a chip's", "state / float32's"),
        *("s8 × s8 in", "share of operations in s8"),
        "a chip receives, GB a step: all, weights as s8, parts of gradients as s32",
    )
    ordered = sorted(records, key=lambda r: (r["parameters"], r["hbm"], -r["devices"]))
    return to_markdown(head, map(_fit, ordered))


def _fit(record: dict[str, Any]) -> tuple[str, ...]:
    mesh = " × ".join(f"{name} {size}" for name, size in record["mesh"].items() if size > 1)
    held, state = record["memory"], record["bytes"]
    integers = [x for x in record["products"] if x["operands"] == ["s8", "s8"]]
    done = {x["phase"] for x in integers}
    share = sum(x["flops"] for x in integers) / sum(x["flops"] for x in record["products"])
    received = [_received(record, kind) for kind in (None, "s8", "s32")]
    return (
        record["config"]["size"].upper(),
        f"{record['topology']}, {mesh}",
        f"{held['arguments'] / _GIB:.2f} GiB",
        f"{held['temporaries'] / _GIB:.2f} GiB",
        f"{sum(held.values()) / _GIB:.2f} of {record['hbm'] / _GIB:.0f} GiB",
        f"{state['state'] / state['state_float32']:.3f}",
        ", ".join(phase for phase in _PHASES if phase in done),
        f"{share:.0%}".replace("%", " %"),
        ", ".join(f"{nbytes:.1f}" for nbytes in received),
    )


def _received(record: dict[str, Any], kind: str | None) -> float:
    """GB that a device receives in a step, of all types or of one."""
    found = (x["bytes"] for x in record["collectives"] if kind in (None, x["types"]))
    return sum(found) / 1e9


def beside(records: list[dict[str, Any]]) -> str:
    """What a step takes of a device, quantized or not, side by side: its records are the columns."""
    ordered = sorted(records, key=lambda r: r["config"]["recipe"])
    names = [r["config"]["recipe"] or r["config"]["dtype"] for r in ordered]
    columns = [_taken(r) | _exchanged(r) for r in ordered]
    exchanged = sorted(
        {name for r in ordered for name in _exchanged(r)},
        key=lambda name: (-max(_moved(r).get(name, 0) for r in ordered), name),
    )
    rows = [
        (name, *(c.get(name, "") for c in columns)) for name in (*_taken(ordered[0]), *exchanged)
    ]
    return to_markdown(("of a device", *names), rows)


def _taken(record: dict[str, Any]) -> dict[str, str]:
    held, state = record["memory"], record["bytes"]
    integers = [x for x in record["products"] if x["operands"] == ["s8", "s8"]]
    share = sum(x["flops"] for x in integers) / sum(x["flops"] for x in record["products"])
    return {
        "arguments": f"{held['arguments'] / _GIB:.3f} GiB",
        "temporaries": f"{held['temporaries'] / _GIB:.3f} GiB",
        "all": f"{sum(held.values()) / _GIB:.3f} of {record['hbm'] / _GIB:.1f} GiB",
        "optimizer's state": f"{state['state'] / _MIB:.2f} MiB",
        "state / float32's": f"{state['state'] / state['state_float32']:.3f}",
        "share of operations in s8 × s8": f"{share:.0%}".replace("%", " %"),
        "kernels a step": f"{record['kernels']['times']:,}",
        "receives a step": f"{sum(x['bytes'] for x in record['collectives']) / 1e6:,.0f} MB",
    }


def _exchanged(record: dict[str, Any]) -> dict[str, str]:
    """MB that a device receives in a step, by collective and types; what is below 0.05 MB is left out."""
    found = {name: f"{nbytes / 1e6:,.1f}" for name, nbytes in _moved(record).items()}
    return {name: f"{text} MB" for name, text in found.items() if text != "0.0"}


def _moved(record: dict[str, Any]) -> dict[str, float]:
    moved: dict[str, float] = {}
    for x in record["collectives"]:
        name = f"{x['kind']} of {x['types']}"
        moved[name] = moved.get(name, 0) + x["bytes"]
    return moved


def weak_scaling(records: list[dict[str, Any]]) -> str:
    """What a chip receives, and the least time of its links, as chips and batch grow together."""
    rows = [
        (f"{row['chips']}", f"{row['received'] / 1e9:.1f}", f"{1e3 * row['links']:.0f} ms")
        for row in scaling.bounds(records).to_dict("records")
    ]
    head = ("chips", "a chip receives, GB a step", "the links need at least")
    return to_markdown(head, rows)


def bounds(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The bound of the products, which is one for all numbers of chips."""
    rows = scaling.bounds(records)
    (products,) = {f"{1e3 * seconds:.0f} ms" for seconds in rows["compute"]}
    said = [
        f"The products at their peaks need {products}",
        f"at most {rows['utilization'].max():.0%}".replace("%", " %"),
    ]
    return {"docs/tpu.md": said}


_COMPILED, _WEAK = "compiled/compiled_*.json", "compiled/weak_*.json"
_GPU = "compiled/gpu_*.json"
TABLES = {
    "train/gpu_fits": Table(_GPU, beside),
    "train/fits": Table(_COMPILED, fits),
    "train/weak_scaling": Table(_WEAK, weak_scaling),
}
PHRASES = (Phrases(_WEAK, bounds),)
