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

import jaxquant as jq
from experiments.harness.training import hlo

WIDTH = 256
WEIGHT_SHAPES = {(WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)}
HEAD_SHAPES = {(WIDTH, aot.VOCABULARY), (aot.VOCABULARY, WIDTH)}
BOTH_INT8, BOTH_BF16 = ("s8", "s8"), ("bf16", "bf16")

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]' (no TPU is needed)",
)


# ---- compiled text


def layer(product: hlo.Product) -> str:
    if "BTNH" in product.origin:  # the einsums of jax.nn.dot_product_attention
        return "attention"
    is_head = any(aot.VOCABULARY in x.shape for x in (*product.operands, product.result))
    return "head" if is_head else "linear"


def phase(product: hlo.Product) -> str:
    """Of products in bfloat16 too, which no scope tells apart."""
    if product.phase != "backward":
        return product.phase
    shape = tuple(n for n in product.result.shape if n > 1)
    return "wgrad" if shape in WEIGHT_SHAPES else "dgrad"


def gathered(text: str) -> Counter[hlo.Array]:
    """What all-gathers bring together, those of scales and other small things left out."""
    found = (x for x in hlo.parse(text).collectives() if x.kind == "all-gather")
    return Counter(x for one in found for x in one.arrays if math.prod(x.shape) >= WIDTH**2)


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
    found = hlo.parse(step(compiled, topology, recipe, layers).text).products()
    linear = Counter((phase(p), p.kinds) for p in found if layer(p) == "linear")
    assert linear == {
        (phase, kinds): aot.LINEARS * layers for phase in ("forward", "dgrad", "wgrad")
    }
    # The head and attention are nobody's rule.
    assert [p.kinds for p in found if layer(p) == "head"] == 3 * [BOTH_BF16]
    attention = [p.kinds for p in found if layer(p) == "attention"]
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
        ("tpu7x:2x2x1", "fp8_delayed_train", ("f8e4m3fn", "f8e4m3fn"), ("f8e4m3fn", "f8e5m2")),
        ("tpu7x:2x2x1", "int8_train", BOTH_INT8, BOTH_INT8),
    ],
)
def test_one_linear_and_its_gradients_on_tpu7x(compiled, topology, recipe, forward, backward):
    text = compiled(topology, "linear", recipe=recipe, width=WIDTH).text
    assert sorted((phase(p), p.kinds) for p in hlo.parse(text).products()) == [
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
    assert hlo.Array("s4", (width, 2 * width)) in hlo.arrays(entry)
    # Converted within the product's fusion: no bfloat16 copy of the weight is ever in memory.
    main = program.text[program.text.index("\nENTRY ") :]
    assert hlo.Array("bf16", (width, 2 * width)) not in hlo.arrays(main)


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


FLOAT8 = [
    ("f8E4M3FN", "f8E4M3FN", "f32"),
    ("f8E4M3FN", "f8E5M2", "f32"),
    ("f8E5M2", "f8E4M3FN", "f32"),
]


@pytest.mark.parametrize(
    ("recipe", "types"),
    [
        ("int8_train", 3 * [("i8", "i8", "i32")]),
        ("fp8_train", FLOAT8),
        ("fp8_delayed_train", FLOAT8),
        ("mxfp8_train", 3 * [("bf16", "bf16", "bf16")]),
        ("w16a16", 3 * [("bf16", "bf16", "bf16")]),
    ],
)
def test_one_linear_and_its_gradients_on_cuda(recipe, types):
    assert types_multiplied(lowered_for_cuda(aot.linear_gradients(recipe, WIDTH))) == types


FP4 = ("nvfp4_train", "mxfp4_train", "nvfp4_eden_train")


@pytest.mark.parametrize("recipe", FP4)
def test_products_in_four_bits_are_simulated_on_cuda(recipe):
    """As the table of platforms says; what else is multiplied are rotations, in float32."""
    assert set(jq.platforms([recipe]).cells[recipe]["gpu"]) == {"simulated"}
    found = Counter(types_multiplied(lowered_for_cuda(aot.linear_gradients(recipe, WIDTH))))
    assert found.pop(("bf16", "bf16", "bf16")) == 3
    assert set(found) == {("f32", "f32", "f32")}


@needs_tpu_compiler
@pytest.mark.parametrize("recipe", FP4)
def test_products_in_four_bits_are_simulated_on_tpu7x(compiled, recipe):
    assert set(jq.platforms([recipe]).cells[recipe]["tpu"]) == {"simulated"}
    text = compiled("tpu7x:2x2x1", "linear", recipe=recipe, width=WIDTH).text
    found = Counter(p.kinds for p in hlo.parse(text).products())
    assert found.pop(BOTH_BF16) >= 3
    assert not any(
        kind.startswith("f8") or kind.startswith("s") for kinds in found for kind in kinds
    )


def test_stored_int4_is_an_argument_on_cuda():
    text = lowered_for_cuda(aot.stored_product(WIDTH))
    (signature,) = re.findall(r"func.func public @main\((.*)\) ->", text)
    assert f"tensor<{WIDTH}x{2 * WIDTH}xi4>" in signature
    assert types_multiplied(text) == [("bf16", "bf16", "f32")]
