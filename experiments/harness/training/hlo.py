"""Read matrix products and collectives from a compiled program's text.

The compiler's own totals count a loop's body once.  Here each instruction comes with the number of times that
it is executed, from the bounds of the loops around it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def _bits(kind: str) -> int:
    """Returns the bits of an element in memory."""
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 8  # pred


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in compiled text: ``s8[256,512]``."""

    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> float:
        """Bytes of its elements; layouts may pad them.

        >>> Array("s4", (3, 5)).nbytes
        7.5
        """
        return math.prod(self.shape) * _bits(self.kind) / 8

    def of(self, kind: str) -> "Array":
        """Returns the same bytes as numbers of another type, in line.

        >>> Array("u32", (2, 3)).of("s8")
        Array(kind='s8', shape=(24,))
        """
        return Array(kind, (int(8 * self.nbytes) // _bits(kind),))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of compiled text: ``%name = results opcode(arguments), attributes``."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    arguments: str
    attributes: str
    is_root: bool = False

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    @property
    def origin(self) -> str:
        """The JAX operations that it came from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """Returns the value of a plain attribute, as ``index=4`` has one."""
        found = re.search(rf"\b{name}=([\w.-]+)", self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute such as ``body`` names."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product.

    Attributes:
        operands: what is multiplied.
        result: of it.
        multiplications: of numbers, when it is executed once.
        origin: the JAX operations that it came from.
        times: that it is executed.
    """

    operands: tuple[Array, Array]
    result: Array
    multiplications: int
    origin: str
    times: int

    @property
    def flops(self) -> int:
        """Multiplications and additions, all times together."""
        return 2 * self.multiplications * self.times

    @property
    def kinds(self) -> tuple[str, ...]:
        """The operands' types; the compiler swaps operands as it likes."""
        return tuple(sorted(x.kind for x in self.operands))

    @property
    def phase(self) -> str:
        """ "forward", "recomputed" for the backward pass, "dgrad" and "wgrad", or "backward" for either."""
        for scope, name in (("dlhs", "dgrad"), ("drhs", "wgrad")):
            if re.search(rf"\b{scope}\b", self.origin):
                return name
        if "rematted_computation" in self.origin:
            return "recomputed"
        return "backward" if "transpose(" in self.origin else "forward"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Arrays that devices bring together.

    Attributes:
        kind: "all-gather", "all-reduce" and so on.
        arrays: the results on one device, in the types of the numbers that travel.
        devices: that take part in each group.
        origin: the JAX operations that it came from.
        times: that it is executed.
    """

    kind: str
    arrays: tuple[Array, ...]
    devices: int
    origin: str
    times: int

    @property
    def nbytes(self) -> float:
        """Bytes that one device receives, all times together, where devices pass them on in rings."""
        size = sum(x.nbytes for x in self.arrays) * self.times
        share = (self.devices - 1) / self.devices
        passes = {
            "all-reduce": 2 * share,
            "reduce-scatter": self.devices - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }
        return size * passes.get(self.kind, share)


def arrays(text: str) -> list[Array]:
    """Returns every array type in a piece of compiled text.

    >>> arrays("(s8[256,512]{1,0:T(32,128)(4,1)}, f32[])")
    [Array(kind='s8', shape=(256, 512)), Array(kind='f32', shape=())]
    """
    return [
        Array(kind, tuple(map(int, filter(None, shape.split(",")))))
        for kind, shape in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", text)
    ]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: their instructions, by name.
        times: that each is executed.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    times: Mapping[str, int]

    def instructions(self) -> Iterator[tuple[Instruction, Mapping[str, Instruction], int]]:
        """Returns (instruction, the computation that it stands in, times) of all that are executed."""
        for name, own in self.computations.items():
            if times := self.times.get(name, 0):
                yield from ((x, own, times) for x in own.values())

    def products(self) -> list[Product]:
        """Returns the matrix products."""
        found = []
        for x, own, times in self.instructions():
            if x.opcode in ("convolution", "dot") or _calls_product(x):
                left, right = (own[name].results[0] for name in x.operands[:2])
                count = _multiplications(x, left, right)
                found.append(Product((left, right), x.results[0], count, x.origin, times))
        return found

    def collectives(self) -> list[Collective]:
        """Returns the collectives.

        An asynchronous one appears in each fusion that it overlaps with, under one channel: it is counted
        once.
        """
        found: dict[str, Collective] = {}
        for x, own, times in self.instructions():
            kind = x.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", x.attributes)
                one = Collective(kind, _results(x, own), _group(x), x.origin, times)
                found.setdefault(channel[1] if channel else x.name, one)
        return list(found.values())


def parse(text: str) -> Program:
    """Returns a program from the text that a compiler gives of it.

    Raises:
        ValueError: no entry computation, or a loop whose bounds cannot be read.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, own = None, dict[str, Instruction]()
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            own = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif instruction := _instruction(line):
            own[instruction.name] = instruction
    if entry is None:
        raise ValueError("this is no compiled program: it has no ENTRY computation")
    times = collections.Counter[str]()
    _count(computations, entry, 1, times)
    return Program(computations, times)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line)
    if found is None:
        return None
    name, results, opcode, rest = found.groups()
    end = _closing(rest)
    is_root = line.lstrip().startswith("ROOT ")
    return Instruction(name, opcode, tuple(arrays(results)), rest[:end], rest[end:], is_root)


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes the one before the text."""
    depth = 1
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return place
    return len(text)


def _count(
    computations: Mapping[str, Mapping[str, Instruction]],
    name: str,
    times: int,
    found: collections.Counter[str],
) -> None:
    """Adds the times that a computation and those that it calls are executed."""
    found[name] += times
    for x in computations.get(name, {}).values():
        if x.opcode == "while":
            condition, body = x.called("condition"), x.called("body")
            assert condition is not None
            assert body is not None
            _count(computations, body, times * _trips(computations, x, condition), found)
            continue
        for callee in _callees(x):
            _count(computations, callee, times, found)


def _callees(x: Instruction) -> list[str]:
    """Returns the computations that an instruction executes once, alternatives each."""
    if x.opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
        names = (
            listed[1]
            if listed
            else " ".join(f"%{x.called(a)}" for a in ("true_computation", "false_computation"))
        )
        return re.findall(r"%?([\w.-]+)", names)
    if x.opcode in ("fusion", "call", "call-start", "async-start", "custom-call"):
        called = x.called("calls") or x.called("to_apply") or x.called("called_computations")
        return [called] if called else []
    return []


def _trips(
    computations: Mapping[str, Mapping[str, Instruction]], loop: Instruction, condition: str
) -> int:
    """Returns how often a loop's body runs: as the text says, or from its counter's bounds and step.

    Loops count from 0: a compiler that unrolls one leaves it there and counts by more than one.
    """
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    own, body = computations[condition], computations[loop.called("body") or ""]
    try:
        (compare,) = (x for x in own.values() if x.opcode == "compare")
        counter, bound = (own[name] for name in compare.operands)
        place = counter.attribute("index")
        (after,) = (x for x in body.values() if x.opcode == "tuple" and x.is_root)
        step = _added(body, after.operands[int(place)], place)
        return -(-int(bound.arguments) // step)
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"the trips of {loop.name} cannot be read from {condition}") from None


def _added(body: Mapping[str, Instruction], name: str, place: str) -> int:
    """Returns what a loop's body adds to an element of its state to get the value of this name."""
    x = body[name]
    if x.opcode == "get-tuple-element" and x.attribute("index") == place:
        return 0
    if x.opcode in ("copy", "bitcast"):
        return _added(body, x.operands[0], place)
    if x.opcode != "add":
        raise ValueError(name)
    one, other = x.operands
    if body[one].opcode == "constant":
        one, other = other, one
    return _added(body, one, place) + int(body[other].arguments)


def _calls_product(x: Instruction) -> bool:
    """Returns whether an instruction calls a product of cuBLAS or cuDNN, as GPUs have them."""
    target = re.search(r'custom_call_target="([^"]*)"', x.attributes)
    known = ("__cublas$gemm", "__cublas$lt$matmul", "__cudnn$conv")
    return x.opcode == "custom-call" and target is not None and target[1].startswith(known)


def _called_multiplications(x: Instruction, left: Array, right: Array) -> int:
    """Returns multiplications of a product that a library computes, those with padding included."""
    result = x.results[0]
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.attributes)
    if axes:
        places = map(int, re.findall(r"\d+", axes[1]))
        return math.prod(result.shape) * math.prod(left.shape[a] for a in places)
    labels = re.search(r"dim_labels=\w+_\w+->(\w+)", x.attributes)
    assert labels is not None
    # Each number of the output, or of its gradient, meets each tap of one feature's kernel.
    filter_gradient = "convBackwardFilter" in x.attributes
    output, kernel = (right, result) if filter_gradient else (result, right)
    if "convBackwardInput" in x.attributes:
        output = left
    features = output.shape[labels[1].index("f")]
    return math.prod(output.shape) * math.prod(kernel.shape) // features


def _multiplications(x: Instruction, left: Array, right: Array) -> int:
    """Returns multiplications of numbers, those with padding left out, when a product is executed once."""
    if x.opcode == "custom-call":
        return _called_multiplications(x, left, right)
    size = math.prod(x.results[0].shape)
    if x.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
        return (
            size * math.prod(left.shape[int(a)] for a in axes[1].split(",") if a) if axes else size
        )
    labels = re.search(r"dim_labels=(\w+)_\w+->(\w+)", x.attributes)
    assert labels is not None
    size *= left.shape[labels[1].index("f")]
    size //= int(x.attribute("feature_group_count") or 1)
    places = [i for i in labels[2] if i.isdigit()]
    for place in sorted(places):
        before = left.shape[labels[1].index(place)]
        after = x.results[0].shape[labels[2].index(place)]
        size = size // after * _taps(before, after, _window(x, int(place)))
    return size


def _window(x: Instruction, place: int) -> dict[str, tuple[int, ...]]:
    """Returns a window's size, stride, pad and so on along one of its axes."""
    found = re.search(r"window=\{([^}]*)\}", x.attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    own = {name: text.split("x")[place] for name, text in fields.items()}
    return {name: tuple(map(int, text.split("_"))) for name, text in own.items()}


def _taps(before: int, after: int, window: Mapping[str, tuple[int, ...]]) -> int:
    """Returns how often a window along one axis meets a number, over all of its positions.

    >>> _taps(8, 1, {"size": (8,)}), _taps(1, 8, {"size": (8,), "pad": (7, 7)})
    (8, 8)
    >>> _taps(18, 18, {"size": (18,), "stride": (17,), "lhs_dilate": (18,)})
    18
    """
    (size,), (stride,) = window.get("size", (1,)), window.get("stride", (1,))
    (spread,), (step,) = window.get("lhs_dilate", (1,)), window.get("rhs_dilate", (1,))
    first = -window.get("pad", (0, 0))[0]
    at = first + stride * np.arange(after)[:, None] + step * np.arange(size)[None, :]
    return int(np.sum((at >= 0) & (at % spread == 0) & (at // spread < before)))


def _results(x: Instruction, own: Mapping[str, Instruction]) -> tuple[Array, ...]:
    """Returns a collective's results; those of the same bytes in other words are what they were before."""
    results, count = list(x.results), len(x.operands)
    if x.opcode.endswith("-start") and len(results) >= 2 * count:
        results = results[count : 2 * count]
    for place, name in enumerate(x.operands[: len(results)]):
        source = own.get(name)
        if source is not None and source.opcode == "bitcast":
            before = own.get(source.operands[0])
            if before is not None and before.results[0].kind != results[place].kind:
                results[place] = results[place].of(before.results[0].kind)
    return tuple(results)


def _group(x: Instruction) -> int:
    """Returns how many devices take part in each group of a collective."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", x.attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", x.attributes)
    if tiled:
        return int(tiled[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", x.attributes)
    return len(listed[1].split(",")) if listed else 2
