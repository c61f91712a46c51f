"""The tables of compiled steps in docs/tpu.md."""

from typing import Any

from experiments.harness.reporting.markdown import Phrases, Table, to_markdown
from experiments.train import scaling

_GIB = 2**30
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
TABLES = {
    "train/fits": Table(_COMPILED, fits),
    "train/weak_scaling": Table(_WEAK, weak_scaling),
}
PHRASES = (Phrases(_WEAK, bounds),)
