"""What a GPU launches when it executes a compiled program: kernels, and the bytes that go through them."""

import dataclasses
from collections.abc import Iterator, Mapping

from experiments.harness.training.hlo import Instruction, Program

# They move nothing, or what is within them is counted by itself.
_NO_KERNEL = (
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that is launched by itself.

    Attributes:
        instruction: as the text has it.
        nbytes: of its operands and results, each counted once and whole: more than it moves where it reads
            a slice.
        times: that it is executed.
    """

    instruction: Instruction
    nbytes: float
    times: int


def kernels(program: Program) -> list[Kernel]:
    """Returns what is launched, in the order of the text."""
    return list(_kernels(program))


def _kernels(program: Program) -> Iterator[Kernel]:
    fused = _within_kernels(program)
    for name, own in program.computations.items():
        times = program.times.get(name, 0)
        if not times or name in fused:
            continue
        for x in own.values():
            if x.opcode not in _NO_KERNEL and not x.opcode.endswith("-done"):
                yield Kernel(x, _nbytes(x, own), times)


def _within_kernels(program: Program) -> set[str]:
    """Returns the computations of fusions and of what they call."""
    found, ahead = set[str](), [_called(x) for x in _fusions(program)]
    while ahead:
        name = ahead.pop()
        if name is not None and name not in found:
            found.add(name)
            ahead += [_called(x) for x in program.computations.get(name, {}).values()]
    return found


def _fusions(program: Program) -> Iterator[Instruction]:
    for own in program.computations.values():
        yield from (x for x in own.values() if x.opcode == "fusion")


def _called(x: Instruction) -> str | None:
    return x.called("calls") or x.called("to_apply")


def _nbytes(x: Instruction, own: Mapping[str, Instruction]) -> float:
    operands = (a for name in x.operands if name in own for a in own[name].results)
    return sum(a.nbytes for a in operands) + sum(a.nbytes for a in x.results)
