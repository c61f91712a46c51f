"""The floors of the house: a file imports from floors below, or from files above it on its own floor."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive  # looks at our files alone

ROOT = Path(__file__).parent.parent

# Rooms by what they are for, on seven floors.  Within a room, a file imports from those named before it.
LIBRARY = [
    {
        "formats": "base integer floating codebook block names",
    },
    {
        "numerics": (
            "sharding reductions opaque groups rounding packing hadamard calibration estimators "
            "quantizer qarray measuring stored stacking"
        ),
    },
    {
        "operations": (
            "integers product dot native einsum ragged conv smoothed adapters attention recipes "
            "tapped monitoring"
        ),
    },
    {
        "engine": (
            "expressions rules batches derivations products scores origins analysis rebuilding "
            "walking"
        ),
    },
    {
        "artifacts": "plain files seals settings storage rule_files specification cards folders serving",
    },
    {
        "functions": "states operations quantizing freezing calibrating coverage monitoring saving",
        "nnx": (
            "modules calls doors layers planning storing monitoring observing calibrating adapting "
            "quantizing saving"
        ),
        "linen": "calls quantizing freezing calibrating saving",
    },
    {
        "ptq": "solvers smooth search identity layers solving resuming quantizing searching",
        "quality": "intervals examples comparison corruption embeddings weights gates monitor versions",
        "optim": (
            "pages codecs cutting tracing bounds traits leaves layout policies plans named inner "
            "state checks blocks updating budget scoring adapting report kernels spans quantizing "
            "identity exchange diagnosing"
        ),
        "laws": "law forms constants intervals solving runs fitting comparison optimum planning",
    },
]
EXPERIMENTS = [
    [
        "harness.files",
        "harness.packages",
        "harness.stopping",
        "harness.watchdog",
        "harness.guarding",
        "harness.cli",
        "harness.sharding",
        "harness.hlo",
        "harness.chips",
        "harness.metering",
        "harness.metrics",
        "harness.processes",
    ],
    [
        "harness.data.markov",
        "harness.data.shards",
        "harness.data.corpus",
        "harness.data.paths",
        "harness.data.tokenizers",
        "harness.data.text",
        "harness.data.tokens",
        "harness.data.windows",
        "harness.data.documents",
        "harness.data.array_records",
        "harness.data.hub",
        "harness.data.loading",
        "harness.models",
        "harness.checkpoints",
        "harness.ledgers",
        "harness.memory",
        "harness.ray_launcher",
        "harness.report",
        "harness.law_tables",
        "harness.peer_codes",
        "harness.peer_optimizers",
    ],
    ["harness.images", "harness.corruptions", "harness.vision", "harness.ood"],
    [
        "harness.pretrained.gguf_header",
        "harness.pretrained.files",
        "harness.pretrained.smollm2",
        "harness.pretrained.minilm",
        "harness.pretrained.references",
    ],
    ["harness.train", "harness.wsd", "harness.trials", "harness.study_cli"],
    [
        "pretrained_quantization.arms",
        "pretrained_quantization.subjects",
        "pretrained_quantization.report",
        "pretrained_quantization.study",
        "pretrained_quantization.__main__",
    ],
    [
        "ptq_overtraining.analysis",
        "ptq_overtraining.added_laws",
        "ptq_overtraining.figures",
        "ptq_overtraining.report",
    ],
    ["ptq_overtraining.study", "ptq_overtraining.__main__"],
    [
        "optimizer_states.arms",
        "optimizer_states.tasks",
        "optimizer_states.law",
        "optimizer_states.analysis",
        "optimizer_states.figures",
        "optimizer_states.report",
        "optimizer_states.running",
        "optimizer_states.study",
        "optimizer_states.optimizers",
        "optimizer_states.__main__",
        "train.program",
        "train.ahead",
        "train.ahead_table",
        "train.scaling",
        "train.claiming",
        "train.monitoring",
        "train.watching",
        "train.running",
        "tokenize",
        "train.__main__",
    ],
    [
        "training_precision.numerics",
        "training_precision.running",
        "training_precision.analysis",
        "training_precision.figures",
        "training_precision.report",
        "training_precision.study",
        "training_precision.__main__",
        "plan",
        "fetch",
        "tokenize",
    ],
    ["benchmark.lm", "benchmark.variants", "benchmark.step"],
    [
        "benchmark.timing",
        "benchmark.serving",
        "benchmark.optimizers",
        "benchmark.report",
        "benchmark.study",
        "benchmark.__main__",
    ],
    [
        "qat_efficiency.tasks",
        "qat_efficiency.measuring",
        "qat_efficiency.lineage",
        "qat_efficiency.latency",
        "qat_efficiency.analysis",
        "qat_efficiency.figures",
        "qat_efficiency.report",
        "qat_efficiency.study",
        "qat_efficiency.__main__",
    ],
]
# What each side may import from outside; anything new is a decision, so it is made here too.
LIBRARY_MAY_USE = {"flax", "jax", "jaxtyping", "numpy", "optax", "orbax", "safetensors", "tqdm"}


def imports(path: Path) -> set[str]:
    """Full names of what a file imports: modules, and names taken from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT / package).with_suffix("").parts): path
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    }


def order(package: str) -> list[str]:
    """The files of a package, each after those that it may import."""
    if package == "experiments":
        return [name for floor in EXPERIMENTS for name in floor]
    rooms = {room: files for floor in LIBRARY for room, files in floor.items()}
    return [f"{room}.{name}" for room, files in rooms.items() for name in files.split()]


@pytest.mark.parametrize("package", ["jaxquant", "experiments"])
def test_every_file_has_a_floor(package):
    assert set(modules(package)) == set(order(package))


@pytest.mark.parametrize("package", ["jaxquant", "experiments"])
def test_imports_go_down(package):
    files = order(package)
    for name, path in modules(package).items():
        targets = imports(path)
        used = {
            other
            for other in files
            for target in targets
            if target == f"{package}.{other}" or target.startswith(f"{package}.{other}.")
        }
        above = {other for other in used if files.index(other) >= files.index(name)}
        assert not above, f"{path} imports {above}, which do not lie below it"


def test_rooms_of_one_floor_know_each_other_in_one_direction_and_there_are_few_floors():
    assert len(LIBRARY) <= 8
    rooms = [room for floor in LIBRARY for room in floor]
    for room in rooms:
        for path in (ROOT / "jaxquant" / room).glob("*.py"):
            known = {name.split(".")[1] for name in imports(path) if name.startswith("jaxquant.")}
            above = {
                other for other in known & set(rooms) if rooms.index(other) > rooms.index(room)
            }
            assert not above, f"{path} imports {above}, which do not lie below it"


def test_the_library_knows_nothing_of_the_studies():
    for path in (ROOT / "jaxquant").rglob("*.py"):
        packages = {name.split(".")[0] for name in imports(path)}
        assert "experiments" not in packages, path


def test_the_library_uses_only_what_it_declares_and_nothing_private():
    import sys

    for path in (ROOT / "jaxquant").rglob("*.py"):
        for name in imports(path):
            package = name.split(".")[0]
            allowed = LIBRARY_MAY_USE | {"jaxquant"} | set(sys.stdlib_module_names)
            assert package in allowed, f"{path} imports {name}"
            assert "._src" not in name, f"{path} imports {name}"
