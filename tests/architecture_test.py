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
            "quantizer scales eden delayed qarray measuring stored stacking"
        ),
    },
    {
        "operations": (
            "integers product operands backward dot native einsum ragged windows taps conv smoothed adapters "
            "attention training recipes platforms tapped delaying monitoring"
        ),
    },
    {
        "engine": (
            "expressions rules batches derivations products scores origins analysis rebuilding "
            "walking"
        ),
    },
    {
        "artifacts": "plain files checksums settings storage rule_files specification cards folders serving",
    },
    {
        "functions": (
            "states operations quantizing freezing calibrating coverage monitoring delaying saving"
        ),
        "nnx": (
            "modules calls doors layers planning storing monitoring observing calibrating delaying "
            "adapting quantizing saving"
        ),
        "linen": "calls quantizing freezing calibrating saving",
    },
    {
        "ptq": "statistics solvers smooth search identity layers solving resuming quantizing searching",
        "quality": (
            "intervals examples report comparison corruption embeddings weights gates monitor versions"
        ),
        "optim": (
            "deprecated pages codecs sharding_axes tracing bounds traits leaves layout policies plans "
            "named traced_update state checks blocks spans updating budget scoring adapting report kernels "
            "kernel_layout quantizing identity exchange diagnosing applying"
        ),
        "laws": (
            "law terms forms growing constants intervals criteria solving runs fitting profiles "
            "comparison optimum chips sizes budgets planning pass_sizes passes"
        ),
    },
]
EXPERIMENTS = [
    {
        "harness.running": (
            "files machine packed processes checkpoints stopping watchdog cli record_store memory packages "
            "ray_launcher trials timing"
        ),
    },
    {
        "harness.data": (
            "markov shards corpus tokenizers windows documents paths array_records corruptions "
            "hub images text tokens loading ood"
        ),
        "harness.peers": "codes optimizers",
        "harness.reporting": (
            "statistics values findings exponents charts provenance prose layout law_tables markdown page "
            "report"
        ),
    },
    {
        "harness.training": (
            "divergence sharding train delaying coarse arms chips hlo kernels targets throughput metrics wsd"
        ),
        "harness.pretrained": "gguf_header files minilm smollm2 references",
    },
    {
        "harness.models": "lm vision",
        "harness": "lengths study",
    },
    {
        "benchmark": "lm optimizers variants step serving report study tables __main__",
        "gradient_precision": (
            "arms measuring running runs comparisons noise forms split law planning analysis law_answers "
            "answers figures law_sections sections report study tables __main__"
        ),
        "optimizer_states": (
            "law tasks contest weights analysis figures transformations optimizers report running study "
            "tables __main__"
        ),
        "pretrained_quantization": "arms report models study tables __main__",
        "ptq_overtraining": (
            "measuring analysis corrections one_exponent added_laws figures rates passes solvers "
            "report repetition study tables __main__"
        ),
        "qat_efficiency": "tasks measuring stages analysis latency figures report study tables __main__",
        "train": "program aot aot_table run_identity monitoring watching running scaling tables __main__",
        "training_precision": (
            "runs robustness one_width analysis planning figures numerics report running study "
            "tables __main__"
        ),
    },
    {
        "device_check": "settings recording environment exactness products steps part running __main__",
        "public_runs": "readers gaps efficiencies joint analysis report tables __main__",
        "": "fetch pack costs plan tables tokenize",
    },
]
# What each side may import from outside; anything new is a decision, so it is made here too.
LIBRARY_MAY_USE = {
    "flax",
    "jax",
    "jaxtyping",
    "numpy",
    "optax",
    "orbax",
    "safetensors",
    "scipy",
    "tqdm",
}


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


FLOORS = {"jaxquant": LIBRARY, "experiments": EXPERIMENTS}


def order(package: str) -> list[str]:
    """The files of a package, each after those that it may import."""
    rooms = {room: files for floor in FLOORS[package] for room, files in floor.items()}
    found = [
        f"{room}.{name}".lstrip(".") for room, files in rooms.items() for name in files.split()
    ]
    return ["checks", "stats", *found, "moved"] if package == "jaxquant" else found


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


@pytest.mark.parametrize("package", ["jaxquant", "experiments"])
def test_there_are_few_floors_and_those_of_experiments_stand_apart(package):
    assert len(FLOORS[package]) <= 8
    studies = EXPERIMENTS[-2]
    for study in studies:
        for path in (ROOT / "experiments" / study).glob("*.py"):
            known = {
                name.split(".")[1] for name in imports(path) if name.startswith("experiments.")
            }
            others = known & set(studies) - {study}
            assert not others, f"{path} imports {others}: no study imports another"


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
