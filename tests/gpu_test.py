"""What products become on GPUs, compiled for an H100 that is not there: types, temporaries and kernels.

The compiler is that of the extra ``cuda-compiler``, for Python 3.12 and later.  It has no autotuner without a
GPU, and its text says nothing of time.
"""

import dataclasses
import functools
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import children
import gpu_aot
import pytest
from conftest import ROOT

import jaxquant as jq
from experiments.harness.models import lm
from experiments.harness.training import hlo, kernels, targets

MISSING = targets.missing_compiler("h100")
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(MISSING is not None, reason=f"programs for GPUs need {MISSING}"),
]
S8, BF16, F32 = ("s8", "s8"), ("bf16", "bf16"), ("f32", "f32")
E4M3, E5M2 = ("f8e4m3fn", "f8e4m3fn"), ("f8e4m3fn", "f8e5m2")
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Compiled:
    text: str
    products: list[list[Any]]
    temp_bytes: int
    kernels: int
    kernel_bytes: float

    def kinds(self) -> Counter:
        """Operand types of its products."""
        return Counter(tuple(kinds) for _, kinds, _ in self.products)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Compiles a program of `gpu_aot`, once a session, and in a process of its own."""
    folder = tmp_path_factory.mktemp("gpu")
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    variables = {"PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "2"}

    @functools.cache
    def build(topology: str, program: str, options: str, flags: str) -> Compiled:
        output = folder / re.sub(r"\W+", "-", f"{topology} {program} {options} {flags}")
        command = [sys.executable, "-m", "gpu_aot", topology, str(output), program, options]
        env = dict(os.environ) | targets.environment(topology) | variables | {"XLA_FLAGS": flags}
        done = children.run(command, cwd=ROOT / "tests", env=env, timeout=300)
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
        return Compiled(output.read_text(), **json.loads(done.stdout.splitlines()[-1]))

    def compile_for(
        program: str, topology: str = "h100", flags: str = "", **options: Any
    ) -> Compiled:
        return build(topology, program, json.dumps(options), flags)

    return compile_for


# ---- recipes: (forward, dlhs, drhs)

SIMULATED = 3 * [BF16]
RECIPES = {
    "w16a16": SIMULATED,
    "w8a8": [S8, BF16, BF16],
    "w4a8": [S8, BF16, BF16],
    "w8a8-token": [S8, BF16, BF16],
    "int8_train": 3 * [S8],
    "fp8_train": [E4M3, E5M2, E5M2],
    "w4a16": SIMULATED,
    "w8a16": SIMULATED,
    "w4a16g128": SIMULATED,
    "w4a8g128": SIMULATED,
    "nf4": SIMULATED,
    "nf4dq": SIMULATED,
    "mxfp8": SIMULATED,
    "mxfp6": SIMULATED,
    "mxfp4": SIMULATED,
    "nvfp4": SIMULATED,
    "mxfp8_train": SIMULATED,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_and_its_gradients_multiply_what_the_recipe_says(compiled, recipe):
    assert compiled("linear", recipe=recipe).kinds() == Counter(RECIPES[recipe])


@pytest.mark.parametrize("recipe", ["int8_train", "fp8_train"])
def test_quantized_gradients_are_told_apart_by_their_scopes(compiled, recipe):
    found = {phase: tuple(kinds) for phase, kinds, _ in compiled("linear", recipe=recipe).products}
    assert found == dict(zip(("forward", "dgrad", "wgrad"), RECIPES[recipe], strict=True))


@pytest.mark.parametrize("recipe", ["int8_train", "fp8_train"])
def test_blackwell_multiplies_the_same_types(compiled, recipe):
    found = compiled("linear", "b200", recipe=recipe)
    assert found.kinds() == Counter(RECIPES[recipe])


def test_rotations_are_small_products_in_float32(compiled):
    found = compiled("linear", recipe="quest4").kinds()
    assert found[BF16] == 3
    assert set(found) == {BF16, F32}


def test_learned_steps_are_simulated(compiled):
    assert compiled("learned", recipe="w4a4-lsq").kinds() == {BF16: 3}


# ---- other operations


@pytest.mark.parametrize(
    ("recipe", "kinds"), [("a8", 2 * [S8]), ("kv8", 2 * [BF16]), ("a8kv4", 2 * [S8])]
)
def test_attention_multiplies_what_the_recipe_says(compiled, recipe, kinds):
    assert compiled("attention", recipe=recipe).kinds() == Counter(kinds)


@pytest.mark.parametrize("recipe", ["int8_train", "fp8_train"])
def test_ragged_products_multiply_what_the_recipe_says(compiled, recipe):
    assert compiled("ragged", recipe=recipe).kinds() == Counter(RECIPES[recipe])


# ---- the optimizer


def test_an_update_of_pages_moves_fewer_bytes_than_it_decodes(compiled):
    plain, pages = (compiled("optimizer", state=state) for state in ("float32", "pages"))
    assert plain.products == pages.products == []
    # Gradient, parameter and update in float32; both moments too, or their pages and what decodes them.
    assert plain.temp_bytes < MIB
    assert plain.kernels < 10
    # The whole leaf at once: codes and bit planes of an element take four bytes and a little.
    elements = math.prod(gpu_aot.MATRIX_OF_STATE)
    assert pages.temp_bytes < 4.5 * elements
    assert pages.kernels <= 30
    assert pages.kernel_bytes < 40 * elements


def test_kernels_are_what_stands_outside_of_fusions(compiled):
    program = hlo.parse(compiled("linear", recipe="w16a16").text)
    launched = kernels.kernels(program)
    assert {"dot", "add"} & {
        x.opcode for own in program.computations.values() for x in own.values()
    }
    assert {x.instruction.opcode for x in launched} <= {"fusion", "copy", "custom-call"}
    least = 2 * (gpu_aot.ROWS * gpu_aot.TERMS + gpu_aot.TERMS * gpu_aot.COLUMNS)
    assert sum(x.nbytes for x in launched) > 3 * least


# ---- passes over memory

# Kernels of a linear and its gradients, and MiB of their operands and results; bfloat16 alone has 5 and 309.
PASSES = {"w8a8": (13, 401), "int8_train": (19, 554), "fp8_train": (18, 473)}


@pytest.mark.parametrize("recipe", PASSES)
def test_a_train_step_s_linear_makes_few_passes(compiled, recipe):
    found = compiled("layer", recipe=recipe)
    launched, nbytes = PASSES[recipe]
    assert found.kernels <= launched
    assert found.kernel_bytes <= nbytes * MIB


@pytest.mark.parametrize("recipe", PASSES)
def test_scales_are_applied_within_the_product(compiled, recipe):
    launched = kernels.kernels(hlo.parse(compiled("layer", recipe=recipe).text))
    written = {a for x in launched for a in x.instruction.results}
    rows = gpu_aot.WINDOWS * gpu_aot.TOKENS
    outputs = [(rows, gpu_aot.HIDDEN), (rows, gpu_aot.WIDTH)]
    assert not {hlo.Array(kind, shape) for kind in ("f32", "s32") for shape in outputs} & written
    assert {hlo.Array("bf16", shape) for shape in outputs} <= written


# Products as a library's, which the autotuner may choose on the device; else they are XLA's own kernels.
LIBRARIES = "--xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
    ("program", "options"), [("layer", {"recipe": "fp8_train"}), ("delayed", {})]
)
def test_float8_products_are_cublas_s_with_their_scales(compiled, program, options):
    found = compiled(program, flags=LIBRARIES, **options)
    program = hlo.parse(found.text)
    calls = [x for x in program.instructions() if "__cublas$lt$matmul$f8" in x[0].attributes]
    kinds = [tuple(sorted(own[n].results[0].kind for n in x.operands[:2])) for x, own, _ in calls]
    assert Counter(kinds) == Counter(RECIPES["fp8_train"])
    for x, own, _ in calls:
        scale = own[x.operands[2]]
        assert scale.opcode != "constant"
        assert scale.results == (hlo.Array("f32", ()),)
    # Nothing scales the results afterwards: a cast to bfloat16 reads them alone.
    rows = gpu_aot.WINDOWS * gpu_aot.TOKENS
    casts = {hlo.Array("bf16", (rows, gpu_aot.HIDDEN)), hlo.Array("bf16", (rows, gpu_aot.WIDTH))}
    weight = hlo.Array("f32", (gpu_aot.WIDTH, gpu_aot.HIDDEN))
    launched = [x.instruction for x in kernels.kernels(program)]
    assert [len(x.operands) for x in launched if casts & {*x.results}] == [1, 1]
    assert [x.opcode for x in launched if weight in x.results] == ["custom-call"]


# ---- topologies


@pytest.mark.parametrize(
    ("topology", "words"), [("h100:0", "with their number"), ("h100:2x2", "h100:8")]
)
def test_topologies_of_gpus_are_numbers_of_them(topology, words):
    with pytest.raises(ValueError, match=words):
        targets.devices(topology)


def test_gpus_of_one_host_are_devices_of_their_kind():
    found = targets.devices("h100:8")
    assert (len(found), found[0].device_kind) == (8, "NVIDIA H100 80GB HBM3")


def test_a_step_is_compiled_and_said_what_it_takes(tmp_path):
    flags = ["--preset=smoke", "--compile_only", "--topology=h100:2", f"--workdir={tmp_path}"]
    flags += ["--config.recipe=int8_train", "--config.state=even-6.0", "--config.vocab_size=256"]
    flags += [
        "--config.size=332k",
        "--config.batch=32",
        "--config.scan=True",
        "--config.remat=True",
    ]
    done = children.run([sys.executable, "-m", "experiments.train", *flags], cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    for words in ("of a H100's", "state / float32's", "wgrad", "all-gather", "kernels, loops"):
        assert words in done.stdout
    record = json.loads((tmp_path / "compiled_h100_2.json").read_text())
    int8 = {x["phase"]: x for x in record["products"] if x["operands"] == ["s8", "s8"]}
    assert set(int8) == {"forward", "recomputed", "dgrad", "wgrad"}
    assert any("s8" in x["types"] for x in record["collectives"])


def test_a_large_step_multiplies_int8_and_fits(tmp_path):
    """113 million parameters, 16 windows of 1024 tokens."""
    flags = ["--preset=tpu", "--compile_only", "--topology=h100", f"--workdir={tmp_path}"]
    flags += ["--config.recipe=int8_train", "--config.batch=16", "--config.scan=True"]
    done = children.run([sys.executable, "-m", "experiments.train", *flags], cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "compiled_h100.json").read_text())
    assert record["fits"]
    assert record["memory"]["temporaries"] < 26 * 2**30
    assert record["kernels"]["times"] < 3500
    flops = {(x["phase"], *x["operands"]): x["flops"] for x in record["products"]}
    each = 2 * lm.SIZES["113m"].non_embedding_parameters * 16 * 1024
    assert {k[0]: v for k, v in flops.items() if k[1:] == S8} == {
        phase: each for phase in ("forward", "dgrad", "wgrad")
    }
    # Of attention's gradient alone, which is JAX's own; all else is bfloat16.
    assert flops[("backward", *F32)] < 0.05 * sum(flops.values())
    assert {k[1:] for k in flops} == {S8, BF16, F32}


# ---- weights that are stored


@pytest.mark.parametrize("rows", [1, 16, 4096])
@pytest.mark.parametrize("recipe", ["w4a16", "w8a16"])
def test_stored_weights_are_read_within_the_product(compiled, recipe, rows):
    found = compiled("stored", recipe=recipe, rows=rows, packed=False)
    assert found.kinds() == ({BF16: 1} if rows > 1 else {})  # one row is a reduction
    assert found.temp_bytes <= 1.5 * MIB
    weight = math.prod(gpu_aot.STORED) * int(recipe[1]) / 8
    others = 2 * rows * sum(gpu_aot.STORED) + 4 * gpu_aot.STORED[1]
    # Where the sum is split, its parts are written and read once more.
    assert found.kernel_bytes <= weight + others + 2.1 * found.temp_bytes


@pytest.mark.parametrize("rows", [1, 16, 4096])
def test_packed_weights_are_written_as_integers_at_most(compiled, rows):
    found = compiled("stored", recipe="w4a16", rows=rows, packed=True)
    assert found.temp_bytes <= math.prod(gpu_aot.STORED) / 2 + 1.5 * MIB
    whole = hlo.Array("bf16", gpu_aot.STORED)
    launched = kernels.kernels(hlo.parse(found.text))
    assert not any(whole in x.instruction.results for x in launched)


# ---- convolutions


def library_calls(found: Compiled) -> list[str]:
    """Operand types and groups of what is called of cuDNN."""
    calls = []
    for x, own, _ in hlo.parse(found.text).instructions():
        if "__cudnn$conv" in x.attributes:
            kinds = {own[name].results[0].kind for name in x.operands[:2]}
            calls.append(f"{' '.join(sorted(kinds))} in {x.attribute('feature_group_count') or 1}")
    return calls


def test_an_int8_convolution_is_cudnn_s(compiled):
    found = compiled("convolution", kind="int8", groups=1, strides=1, quantized=False)
    assert sorted(library_calls(found)) == ["bf16 in 1", "bf16 in 1", "s8 in 1"]


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("groups", [1, 4, gpu_aot.CHANNELS])
def test_int8_gradients_and_groups_are_products_of_int8(compiled, groups, strides):
    found = compiled("convolution", kind="int8", groups=groups, strides=strides, quantized=True)
    # In groups, cuDNN's int8 is wrong; the gradient by the window would be one of int32.
    assert set(library_calls(found)) <= {"s8 in 1"}
    assert len(library_calls(found)) == (0 if groups > 1 else 2 if strides == 1 else 1)
    assert set(found.kinds()) <= {S8}


def test_float8_convolutions_multiply_float8(compiled):
    found = compiled("convolution", kind="fp8", groups=1, strides=1, quantized=False)
    assert found.kinds()[E4M3] == 1


# ---- the table of platforms

TABLE = jq.platforms().cells
NATIVE = {"int8": [S8], "float8": [E4M3, E5M2]}


@pytest.mark.parametrize("recipe", TABLE)
def test_the_table_of_platforms_says_what_is_compiled(compiled, recipe):
    cell = TABLE[recipe]["gpu"]
    program = "attention" if len(cell) == 2 else "learned" if "lsq" in recipe else "linear"
    found = compiled(program, recipe=recipe).kinds()
    rotations = found.pop(F32, 0)
    assert (rotations > 0) == bool(re.search(r"hadamard=\d", repr(jq.recipe(recipe))))
    for word, kinds in NATIVE.items():
        assert sum(found[x] for x in kinds) == cell.count(word)
    assert found[BF16] == sum(word not in NATIVE for word in cell)
    assert found.total() == len(cell)


def test_float8_gradients_add_up_in_float32(compiled):
    text = compiled("linear", recipe="fp8_train").text
    dots = [x for x, _, _ in hlo.parse(text).instructions() if x.opcode == "dot"]
    assert len(dots) == 3
    highest = [x.origin for x in dots if "operand_precision={highest" in x.attributes]
    assert sorted(re.findall(r"\b(dlhs|drhs)\b", " ".join(highest))) == ["dlhs", "drhs"]
