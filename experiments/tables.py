"""Rebuilds the tables of measured figures in the pages from committed records: python -m experiments.tables

Each lies between markers in README.md, experiments/README.md or docs/, and is made from a file below
experiments/results: a study's summary.json, which the study's own command makes of its records.
Figures in sentences stay as they are written; those that differ from their records are printed.  It
imports all studies, and so takes the extras `experiments` and `pretrained`.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.benchmark import tables as benchmark
from experiments.gradient_precision import tables as gradient_precision
from experiments.harness.reporting import markdown
from experiments.harness.reporting.markdown import Phrases, Table
from experiments.harness.running import cli, files
from experiments.optimizer_states import tables as optimizer_states
from experiments.ptq_overtraining import tables as ptq_overtraining
from experiments.public_runs import tables as public_runs
from experiments.qat_efficiency import tables as qat_efficiency
from experiments.train import tables as train
from experiments.training_precision import tables as training_precision

try:
    from experiments.pretrained_quantization import tables as pretrained_quantization
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    print(f"error: {missing}: pip install -e '.[experiments,pretrained]'", file=sys.stderr)
    sys.exit(2)

FLAGS = flags.FLAGS
ROOT = Path(__file__).parent.parent
_RESULTS = "experiments/results"
STUDIES = (
    ptq_overtraining,
    training_precision,
    pretrained_quantization,
    optimizer_states,
    qat_efficiency,
    train,
    public_runs,
    benchmark,
    gradient_precision,
)
TABLES: dict[str, Table] = {name: t for study in STUDIES for name, t in study.TABLES.items()}
PHRASES: tuple[Phrases, ...] = tuple(p for study in STUDIES for p in study.PHRASES)


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing is to be set."""


def pages() -> dict[str, Path]:
    """The pages that may hold tables, by their path in the repository."""
    own = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
    own += sorted((ROOT / "docs").rglob("*.md"))
    return {path.relative_to(ROOT).as_posix(): path for path in own if "_build" not in path.parts}


@functools.cache
def read(records: str) -> Any:
    """The JSON below experiments/results; None where it is not there.

    Args:
        records: a file, or files with a ``*``, of which a list is made in the order of their names.
    """
    if "*" in records:
        found = [files.read_json(path) for path in sorted((ROOT / _RESULTS).glob(records))]
        return found or None
    return files.read_json(ROOT / _RESULTS / records)


def rebuilt(names: Sequence[str]) -> dict[str, str]:
    """Tables by name, as their records give them; those without records are left out.

    Raises:
        ValueError: a name that is none of `TABLES`.
    """
    for name in names:
        if name not in TABLES:
            raise ValueError(f"--names are of {', '.join(TABLES)}; got {name!r}")
    values = {name: read(TABLES[name].records) for name in names}
    return {name: TABLES[name].make(v) for name, v in values.items() if v is not None}


def phrases() -> dict[str, list[str]]:
    """What pages have to say outside tables, by page."""
    found: dict[str, list[str]] = {}
    for one in PHRASES:
        value = read(one.records)
        for page, said in ({} if value is None else one.make(value)).items():
            found.setdefault(page, []).extend(said)
    return found


def differences(texts: Mapping[str, str], names: Sequence[str] | None = None) -> list[str]:
    """A line for each figure of the pages that differs from its records.

    Args:
        texts: the pages, by path.
        names: of tables; all of them, and what stands in sentences, where not given.

    Raises:
        ValueError: an unknown name; markers that do not match.
    """
    tables = rebuilt(list(TABLES) if names is None else names)
    marked = [(page, name) for page, text in texts.items() for name in _blocks(page, text)]
    said = [
        f"{page}: {line}"
        for page, text in texts.items()
        for line in markdown.table_differences(text, tables)
    ]
    for page, name in marked if names is None else ():
        if name not in TABLES:
            said.append(f"{page}: {name}: no table has this name")
        elif name not in tables:
            said.append(f"{page}: {name}: {_RESULTS}/{TABLES[name].records} is not there")
    places = {name for _, name in marked}
    said += [f"{name}: no page has its marker" for name in tables if name not in places]
    for page, wanted in (phrases() if names is None else {}).items():
        said += [f"{page}: {line}" for line in markdown.missing_phrases(texts[page], wanted)]
    return said


def _blocks(page: str, text: str) -> dict[str, str]:
    try:
        return markdown.blocks(text)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None


def run(_: Config) -> None:
    names = FLAGS.names or None
    texts = {page: path.read_text(encoding="utf-8") for page, path in pages().items()}
    said = differences(texts, names)
    if said and not FLAGS.check:
        tables = rebuilt(names or list(TABLES))
        new = {page: markdown.replaced(text, tables) for page, text in texts.items()}
        for page in (page for page in new if new[page] != texts[page]):
            files.write(ROOT / page, new[page])
            print(f"{page} is rewritten")
        said = differences(new, names)
    if said:
        print("\n".join(said))
        sys.exit(1)
    marked = {name for page, text in texts.items() for name in _blocks(page, text)}
    print(f"{len(marked if names is None else names)} tables are as their records give them")


if __name__ == "__main__":
    flags.DEFINE_list("names", [], f"Tables; all where not given. Of {', '.join(TABLES)}.")
    flags.DEFINE_bool("check", False, "Write nothing; print what differs, with exit status 1.")
    cli.main(run, {"default": Config()}, default="default")
