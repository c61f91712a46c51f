"""The floors of the house: a file imports from floors below, or from files above it on its own floor."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive  # looks at our files alone

ROOT = Path(__file__).parent.parent

LIBRARY = [
    [
        "sharding",
        "files",
        "seals",
        "formats.base",
        "formats.integer",
        "formats.floating",
        "formats.codebook",
        "formats.block",
        "formats.names",
        "rounding",
        "packing",
        "hadamard",
        "pages",
        "reductions",
        "opaque",
    ],
    [
        "calibration",
        "estimators",
        "groups",
        "quantizer",
        "qarray",
        "measuring",
        "stored",
        "stacking",
        "storage",
    ],
    [
        "integers",
        "product",
        "dot",
        "native",
        "einsum",
        "ragged",
        "conv",
        "smoothed",
        "adapters",
        "attention",
        "recipes",
        "tapped",
        "monitoring",
    ],
    ["expressions", "rules"],
    [
        "engine.derivations",
        "engine.products",
        "engine.scores",
        "engine.origins",
        "engine.analysis",
        "engine.rebuilding",
        "engine.walking",
    ],
    [
        "functions.states",
        "functions.operations",
        "functions.quantizing",
        "functions.freezing",
        "functions.calibrating",
        "functions.coverage",
        "functions.monitoring",
        "batches",
    ],
    ["settings", "rule_files", "specification", "cards", "artifacts"],
    [
        "nnx.modules",
        "nnx.calls",
        "nnx.doors",
        "nnx.layers",
        "nnx.planning",
        "nnx.storing",
        "nnx.monitoring",
        "nnx.observing",
        "nnx.calibrating",
        "nnx.adapting",
        "nnx.quantizing",
    ],
    ["linen.calls", "linen.quantizing", "linen.freezing", "linen.calibrating"],
    [
        "ptq.solvers",
        "ptq.smooth",
        "ptq.search",
        "ptq.identity",
        "ptq.layers",
        "ptq.solving",
        "ptq.resuming",
        "ptq.quantizing",
        "ptq.searching",
    ],
    [
        "quality.intervals",
        "quality.examples",
        "quality.comparison",
        "quality.corruption",
        "quality.embeddings",
        "quality.weights",
        "quality.gates",
        "quality.monitor",
    ],
    ["functions.saving", "nnx.saving", "linen.saving", "versions", "serving"],
    [
        "laws.law",
        "laws.forms",
        "laws.constants",
        "laws.intervals",
        "laws.solving",
        "laws.runs",
        "laws.fitting",
        "laws.comparison",
        "laws.optimum",
        "laws.planning",
    ],
    [
        "optim.codecs",
        "optim.cutting",
        "optim.tracing",
        "optim.bounds",
        "optim.traits",
        "optim.leaves",
        "optim.layout",
        "optim.policies",
        "optim.plans",
        "optim.named",
    ],
    [
        "optim.inner",
        "optim.state",
        "optim.checks",
        "optim.blocks",
        "optim.updating",
    ],
    ["optim.budget", "optim.scoring", "optim.adapting", "optim.report"],
    ["optim.kernels", "optim.spans", "optim.quantizing"],
    ["optim.identity", "optim.exchange", "optim.diagnosing"],
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


@pytest.mark.parametrize(
    ("package", "floors"), [("jaxquant", LIBRARY), ("experiments", EXPERIMENTS)]
)
def test_every_file_has_a_floor(package, floors):
    assert set(modules(package)) == {name for floor in floors for name in floor}


@pytest.mark.parametrize(
    ("package", "floors"), [("jaxquant", LIBRARY), ("experiments", EXPERIMENTS)]
)
def test_imports_go_down(package, floors):
    order = [name for floor in floors for name in floor]
    for name, path in modules(package).items():
        targets = imports(path)
        used = {
            other
            for other in order
            for target in targets
            if target == f"{package}.{other}" or target.startswith(f"{package}.{other}.")
        }
        above = {other for other in used if order.index(other) >= order.index(name)}
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
