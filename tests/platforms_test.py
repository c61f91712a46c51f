"""What the products become on accelerators, without one: compiled for TPUs, lowered for GPUs.

libtpu compiles for a TPU that is not there.  The compiled text shows which types are multiplied and
which travel between devices; it says nothing of time.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import aot
import pytest
from conftest import ROOT

WIDTH = 256
WEIGHT_SHAPES = {(WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)}
HEAD_SHAPES = {(WIDTH, aot.VOCABULARY), (aot.VOCABULARY, WIDTH)}
BOTH_INT8, BOTH_BF16 = ("s8", "s8"), ("bf16", "bf16")

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]' (no TPU is needed)",
)


# ---- compiled text


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in compiled text: ``s8[256,512]``."""

    kind: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product in compiled text, where it is a convolution."""

    operands: tuple[Array, Array]
    result: Array
    origin: str  # the JAX operations that it came from

    @property
    def kinds(self) -> tuple[str, ...]:
        """The operands' types; the compiler swaps operands as it likes."""
        return tuple(sorted(x.kind for x in self.operands))

    @property
    def layer(self) -> str:
        if "BTNH" in self.origin:  # the einsums of jax.nn.dot_product_attention
            return "attention"
        is_head = any(aot.VOCABULARY in x.shape for x in (*self.operands, self.result))
        return "head" if is_head else "linear"

    @property
    def phase(self) -> str:
        if "transpose(" not in self.origin:
            return "forward"
        shape = tuple(n for n in self.result.shape if n > 1)
        return "wgrad" if shape in WEIGHT_SHAPES else "dgrad"


def arrays(text: str) -> list[Array]:
    """Every array type in a piece of compiled text.

    >>> arrays("(s8[256,512]{1,0:T(32,128)(4,1)}, f32[])")
    [Array(kind='s8', shape=(256, 512)), Array(kind='f32', shape=())]
    """
    return [
        Array(kind, tuple(map(int, filter(None, shape.split(",")))))
        for kind, shape in re.findall(r"\b([a-z]+\d+\w*)\[([\d,]*)\]", text)
    ]


def products(text: str) -> list[Product]:
    """The matrix products of a program; names are looked up in the computation that they stand in."""
    found, types = [], {}
    for line in text.splitlines():
        if line.startswith("}"):
            types = {}
        instruction = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\S+) ([\w-]+)\((.*)", line)
        if instruction is None:
            continue
        name, result, opcode, rest = instruction.groups()
        types[name] = next(iter(arrays(result)), None)
        if opcode in ("convolution", "dot"):
            left, right = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            origin = re.search(r'op_name="([^"]*)"', rest)
            found.append(
                Product((types[left], types[right]), types[name], origin[1] if origin else "")
            )
    return found


def gathered(text: str) -> Counter[Array]:
    """What all-gathers bring together, those of scales and other small things left out.

    An asynchronous one appears in each fusion that it overlaps with, under one channel.
    """
    channels = {}
    for line in text.splitlines():
        gather = re.match(r"\s+(?:ROOT )?%[\w.-]+ = (.*?) all-gather(?:-start)?\(", line)
        if gather is not None:
            channels[re.search(r"channel_id=(\d+)", line)[1]] = arrays(gather[1])
    everything = (x for results in channels.values() for x in results)
    return Counter(x for x in everything if math.prod(x.shape) >= WIDTH**2)


# ---- compiled for TPU


@dataclasses.dataclass(frozen=True)
class Compiled:
    text: str
    argument_bytes: int
    temp_bytes: int
    moved_bytes: float  # what kernels move within themselves is not among them


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Compiles a program of `aot` for a topology: once a session, and in a process of its own, for
    some programs abort the compiler's (v4 with 2-bit types; tpu7x with some small quantized steps)."""
    folder = tmp_path_factory.mktemp("aot")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock lets one process compile at a time
        "PYTHONPATH": str(ROOT),
    }

    @functools.cache
    def build(topology: str, program: str, options: str) -> Compiled:
        output = folder / re.sub(r"\W+", "-", f"{topology} {program} {options}")
        done = subprocess.run(
            [sys.executable, str(Path(aot.__file__)), topology, str(output), program, options],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
        return Compiled(output.read_text(), **json.loads(done.stdout.splitlines()[-1]))

    return lambda topology, program, **options: build(topology, program, json.dumps(options))


def step(compiled, topology: str, recipe: str | None, layers: int) -> Compiled:
    return compiled(topology, "step", recipe=recipe, layers=layers, width=WIDTH)


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("topology", "recipe", "layers", "kinds"),
    [
        ("v5e:4x4", "int8_train", 2, BOTH_INT8),
        ("v6e:2x2", "int8_train", 1, BOTH_INT8),
        ("v5e:4x4", None, 1, BOTH_BF16),  # the same count finds no s8 where nothing is quantized
    ],
)
def test_a_training_step_on_tpu_multiplies_what_the_recipe_says(
    compiled, topology, recipe, layers, kinds
):
    found = products(step(compiled, topology, recipe, layers).text)
    linear = Counter((p.phase, p.kinds) for p in found if p.layer == "linear")
    assert linear == {
        (phase, kinds): aot.LINEARS * layers for phase in ("forward", "dgrad", "wgrad")
    }
    # The head and attention are nobody's rule.
    assert [p.kinds for p in found if p.layer == "head"] == 3 * [BOTH_BF16]
    attention = [p.kinds for p in found if p.layer == "attention"]
    assert len(attention) >= 6 * layers  # some are computed twice instead of being kept
    assert set(attention) <= {BOTH_BF16, ("bf16", "f32")}


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("topology", "recipe", "layers", "kind"),
    [
        ("v5e:4x4", "int8_train", 2, "s8"),
        ("v6e:2x2", "int8_train", 1, "s8"),
        ("v5e:4x4", None, 1, "bf16"),
    ],
)
def test_sharded_weights_travel_as_the_numbers_that_are_multiplied(
    compiled, topology, recipe, layers, kind
):
    found = gathered(step(compiled, topology, recipe, layers).text)
    weights = {x: n for x, n in found.items() if x.shape not in HEAD_SHAPES}
    assert {x.kind for x in weights} == {kind}
    assert {x.shape for x in weights} == WEIGHT_SHAPES
    # Each weight for the forward pass and, where it is not kept until then, again for dgrad.
    assert aot.LINEARS * layers <= sum(weights.values()) <= 2 * aot.LINEARS * layers


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("topology", "recipe", "forward", "backward"),
    [
        ("tpu7x:2x2x1", "fp8_train", ("f8e4m3fn", "f8e4m3fn"), ("f8e4m3fn", "f8e5m2")),
        ("tpu7x:2x2x1", "int8_train", BOTH_INT8, BOTH_INT8),
    ],
)
def test_one_linear_and_its_gradients_on_tpu7x(compiled, topology, recipe, forward, backward):
    text = compiled(topology, "linear", recipe=recipe, width=WIDTH).text
    assert sorted((p.phase, p.kinds) for p in products(text)) == [
        ("dgrad", backward),
        ("forward", forward),
        ("wgrad", backward),
    ]
    assert {x.kind for x in gathered(text)} == {forward[0]}


@needs_tpu_compiler
def test_stored_int4_takes_half_a_byte_on_tpu(compiled):
    width = 512
    program = compiled("v5e:2x2", "stored", width=width)
    activations, weight, scales = 2 * aot.BATCH * width, width * 2 * width // 2, 4 * 2 * width
    assert program.argument_bytes == activations + weight + scales
    (entry,) = re.findall(r"^ENTRY .* \((.*)\) ->", program.text, re.MULTILINE)
    assert Array("s4", (width, 2 * width)) in arrays(entry)
    # Converted within the product's fusion: no bfloat16 copy of the weight is ever in memory.
    main = program.text[program.text.index("\nENTRY ") :]
    assert Array("bf16", (width, 2 * width)) not in arrays(main)


# ---- lowered for CUDA


def lowered_for_cuda(program: aot.Program) -> str:
    function, arguments = program
    return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def types_multiplied(text: str) -> list[tuple[str, ...]]:
    """(left, right, result) of every dot_general in StableHLO, sorted."""
    signature = r"dot_general .*: \((\S+), (\S+)\) -> (\S+)"
    found = re.findall(signature, text)
    assert len(found) == text.count("stablehlo.dot_general")
    return sorted(tuple(re.search(r"(\w+)>$", t.replace("x", " "))[1] for t in f) for f in found)


@pytest.mark.parametrize(
    ("recipe", "types"),
    [
        ("int8_train", 3 * [("i8", "i8", "i32")]),
        (
            "fp8_train",
            [
                ("f8E4M3FN", "f8E4M3FN", "f32"),
                ("f8E4M3FN", "f8E5M2", "f32"),
                ("f8E5M2", "f8E4M3FN", "f32"),
            ],
        ),
        ("w16a16", 3 * [("bf16", "bf16", "bf16")]),
    ],
)
def test_one_linear_and_its_gradients_on_cuda(recipe, types):
    assert types_multiplied(lowered_for_cuda(aot.linear_gradients(recipe, WIDTH))) == types


def test_stored_int4_is_an_argument_on_cuda():
    text = lowered_for_cuda(aot.stored_product(WIDTH))
    (signature,) = re.findall(r"func.func public @main\((.*)\) ->", text)
    assert f"tensor<{WIDTH}x{2 * WIDTH}xi4>" in signature
    assert types_multiplied(text) == [("bf16", "bf16", "f32")]
