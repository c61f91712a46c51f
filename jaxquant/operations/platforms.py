"""What each platform multiplies for a recipe: 8-bit numbers, or values in floating point."""

import dataclasses
from collections.abc import Iterable, Mapping

from jaxquant.operations.attention import Attention
from jaxquant.operations.dot import DotGeneral
from jaxquant.operations.integers import is_integer
from jaxquant.operations.operands import Operands
from jaxquant.operations.product import is_float8
from jaxquant.operations.recipes import RECIPES, recipe

PLATFORMS = ("cpu", "tpu", "gpu")
# CPUs have no products of float8, and multiply the same values in float32.  Of TPUs, tpu7x has them.
_FLOAT8 = ("tpu", "gpu")
_OTHERS = (
    "w8a8", "w8a8-token", "w4a8", "w8a16", "w4a16", "w4a16g128", "w4a8g128", "w4a4-lsq", "w4a4-quest",
    "a8", "kv8", "a8kv4",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlatformTable:
    """What is multiplied, by recipe and platform; `print` shows it as a Markdown table.

    A cell has a word for the forward product, ∂lhs and ∂rhs, or for both products of attention:

    - ``int8``: int8 × int8 with int32 sums.
    - ``float8``: float8 × float8 with float32 sums.
    - ``stored``: one operand is stored in few bits, and multiplied in the other's type.
    - ``simulated``: quantized values, in the operands' own type.
    - ``float``: operands that are not quantized.

    Attributes:
        cells: by recipe, then by platform.
    """

    cells: Mapping[str, Mapping[str, tuple[str, ...]]]

    def __str__(self) -> str:
        head = ("recipe", *PLATFORMS)
        rows = [
            (f"`{name}`", *(_words(cells[platform]) for platform in PLATFORMS))
            for name, cells in self.cells.items()
        ]
        lines = [head, tuple("---" for _ in head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def platforms(recipes: Iterable[str] | None = None) -> PlatformTable:
    """Returns what each platform multiplies for recipes.

    Nothing is refused: what a platform does not have is simulated, with the same values.  Words hold for
    matrix products, and were read from programs compiled for CPUs, TPUs (tpu7x) and GPUs (H100).  They say
    nothing of time.

    Args:
        recipes: names, as `recipe` takes them; by default all of `RECIPES` and the usual others.

    Raises:
        ValueError: a name that `recipe` does not know.

    >>> print(platforms(["int8_train", "fp8_train", "w4a16"]))
    | recipe | cpu | tpu | gpu |
    | --- | --- | --- | --- |
    | `int8_train` | int8 | int8 | int8 |
    | `fp8_train` | simulated | float8 | float8 |
    | `w4a16` | stored, float, float | stored, float, float | stored, float, float |
    """
    names = (*RECIPES, *_OTHERS) if recipes is None else tuple(recipes)
    return PlatformTable({name: {p: _cell(recipe(name), p) for p in PLATFORMS} for name in names})


def _words(cell: tuple[str, ...]) -> str:
    return cell[0] if len(set(cell)) == 1 else ", ".join(cell)


def _cell(value: DotGeneral | Attention, platform: str) -> tuple[str, ...]:
    if isinstance(value, Attention):
        cached = "float" if value.kv is None else "simulated"
        return tuple(
            cached if dot is None else _word(dot.forward, None, platform)
            for dot in (value.qk, value.pv)
        )
    forward = value.forward
    return (
        _word(forward, None, platform),
        _word(value.dlhs, forward.rhs, platform),
        _word(value.drhs, forward.lhs, platform),
    )


def _word(operands: Operands | None, kept, platform: str) -> str:
    """Returns the word for a product whose second operand may be one that the forward product kept."""
    if operands is None or (operands.lhs is None and operands.rhs is None):
        return "float"
    if operands.arithmetic == "simulated":
        return "simulated"
    pair = (operands.lhs, operands.rhs or kept)
    elements = [quantizer.element for quantizer in pair if quantizer is not None]
    if len(elements) < 2:
        return "stored"
    if all(map(is_integer, elements)):
        return "int8"
    is_native = all(map(is_float8, elements)) and platform in _FLOAT8
    return "float8" if is_native else "simulated"
