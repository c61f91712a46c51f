"""Format the cost of a compiled step on each chip as text."""

from collections.abc import Iterator, Mapping
from typing import Any

_GIB, _MIB = 2**30, 2**20


def to_text(record: Mapping[str, Any]) -> str:
    """Returns tables of memory, products, collectives and operations, from `aot.compiled`'s record."""
    mesh = " × ".join(f"{name} {size}" for name, size in record["mesh"].items() if size > 1)
    config = record["config"]
    head = (
        f"{record['parameters']:,} parameters on {record['topology']} ({record['devices']} devices: "
        f"{mesh or 'one'}); {config['batch']} × {config['sequence']} tokens a step, recipe "
        f"{config['recipe'] or 'float'}, state {config['state']}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [_memory(record), _state(record)]
    if record["fits"]:
        parts += [_products(record), _collectives(record), _operations(record)]
    foot = f"Compiled by {versions}: it proves lowering, fit and bytes, and says nothing of time."
    return "\n\n".join([head, *parts, foot])


def _memory(record: Mapping[str, Any]) -> str:
    hbm = record["hbm"]
    if not record["fits"]:
        return table(
            ("HBM of a device", "GiB"),
            [
                ("used", _gib(record["used"])),
                ("usable, by the compiler", _gib(record["usable"])),
                ("**too much**", _gib(record["beyond"])),
            ],
        )
    held = record["memory"]
    total = sum(held.values())
    rows = [(name, _gib(nbytes)) for name, nbytes in held.items()]
    rows += [("**all**", _gib(total)), (f"of a {record['chip']}'s", _gib(hbm))]
    rows += [("share", f"{total / hbm:.1%}")]
    return table(("HBM of a device", "GiB"), rows)


def _state(record: Mapping[str, Any]) -> str:
    held = record["bytes"]
    return table(
        ("arguments of a device", "MiB"),
        [
            ("parameters", f"{held['parameters'] / _MIB:.2f}"),
            ("optimizer's state", f"{held['state'] / _MIB:.2f}"),
            ("both moments in float32", f"{held['state_float32'] / _MIB:.2f}"),
            ("state / float32's", f"{held['state'] / held['state_float32']:.4f}"),
        ],
    )


def _products(record: Mapping[str, Any]) -> str:
    total = sum(x["flops"] for x in record["products"])
    rows = [
        (x["phase"], " × ".join(x["operands"]), f"{x['times']:,}", f"{x['flops'] / total:.1%}")
        for x in record["products"]
    ]
    return table(("matrix products", "operands", "times a step", "of operations"), rows)


def _collectives(record: Mapping[str, Any]) -> str:
    rows = [
        (x["kind"], x["types"], f"{x['devices']}", f"{x['times']:,}", f"{x['bytes'] / 1e6:,.1f}")
        for x in record["collectives"]
    ]
    total = sum(x["bytes"] for x in record["collectives"])
    rows.append(("**all**", "", "", "", f"{total / 1e6:,.1f}"))
    return table(
        ("collectives", "types", "devices", "times a step", "MB that a device receives"), rows
    )


def _operations(record: Mapping[str, Any]) -> str:
    products = sum(x["flops"] for x in record["products"])
    model = record["model_flops"] / record["devices"]
    rows = [
        ("operations of the products, loops times their trips", f"{products:.4g}"),
        ("that the model needs (nothing twice)", f"{model:.4g}"),
    ]
    if compiler := record.get("compiler"):
        rows += [
            ("the compiler's count of operations, loops once", f"{compiler['flops']:.4g}"),
            ("the compiler's bytes accessed, loops once", f"{compiler['bytes_accessed']:.4g}"),
        ]
    if kernels := record.get("kernels"):
        rows += [
            ("kernels, loops times their trips", f"{kernels['times']:,}"),
            ("bytes of their operands and results, at most", f"{kernels['bytes']:.4g}"),
        ]
    return table(("operations and bytes of a device", ""), rows)


def _gib(nbytes: float) -> str:
    return f"{nbytes / _GIB:.3f}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Returns an aligned Markdown table."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def lines() -> Iterator[str]:
        for row in (head, tuple("-" * w for w in widths), *rows):
            cells = (
                cell.ljust(w) if i == 0 or not _is_number(cell) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            yield f"| {' | '.join(cells)} |"

    return "\n".join(lines())


def _is_number(text: str) -> bool:
    return text.rstrip("%").replace(",", "").replace(".", "").isdigit()
