"""Where a report comes from: study, papers, command, commit, date, machine."""

import collections
import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = "https://github.com/jaxquant/jaxquant"
_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Source:
    """What a study's report is made by.

    Attributes:
        study: name of its module under experiments.
        question: in one sentence.
        papers: as `experiments.harness.study.Study` has them.
        command: that rebuilds the report from the folder of its records.
        seeds: the fewest and the most of one setting; None where not known.
    """

    study: str
    question: str
    papers: Sequence[str]
    command: str
    seeds: tuple[int, int] | None = None

    @property
    def is_smoke(self) -> bool:
        """Whether its preset is smoke, which shows that a study runs and no more."""
        return "--preset=smoke" in self.command.split()


def seeds(records: Iterable[dict]) -> tuple[int, int] | None:
    """The fewest and the most seeds of trials that are equal otherwise; None where trials have no seed.

    >>> seeds([{"trial": {"bits": 4, "seed": s}} for s in range(3)])
    (3, 3)
    """
    trials = [record["trial"] for record in records if "seed" in record["trial"]]
    settings = [json.dumps({**t, "seed": None}, sort_keys=True) for t in trials]
    counts = collections.Counter(settings).values()
    return (min(counts), max(counts)) if counts else None


def command(study: str, presets: Mapping[str, Any], config: Any) -> str:
    """The command of a config: the nearest preset, and the fields that differ from it.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     seeds: int = 3
    >>> command("name", {"smoke": Config(1), "laptop": Config()}, Config(5))
    'python -m experiments.name --preset=smoke --config.seeds=5 --workdir=DIR'
    """
    changed = {name: _changes(preset, config) for name, preset in presets.items()}
    preset = min(changed, key=lambda name: len(changed[name]))
    flags = "".join(
        f" --config.{k}={_quoted(v)}" for k, v in changed[preset].items() if k != "workers"
    )
    return f"python -m experiments.{study} --preset={preset}{flags} --workdir=DIR"


def _changes(preset: Any, config: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(config):
        return {}
    names = [field.name for field in dataclasses.fields(config)]
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(preset, n, None)}


def _quoted(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./:+-]+", text) else f'"{text}"'


def paper_link(paper: str) -> tuple[str, str]:
    """A paper's title and address; no address where it is none of arXiv's.

    >>> paper_link("2411.04330 (Scaling Laws for Precision)")
    ('Scaling Laws for Precision, arXiv 2411.04330', 'https://arxiv.org/abs/2411.04330')
    """
    found = re.fullmatch(r"(\d{4}\.\d{4,5})(?:\s+\((.*)\))?", paper)
    if not found:
        return paper, ""
    number, title = found.groups()
    named = f"arXiv {number}"
    return (f"{title}, {named}" if title else named), f"https://arxiv.org/abs/{number}"


def commit() -> str:
    """The commit of this code; "" outside a repository."""
    return _git("rev-parse", "HEAD")


def has_changes() -> bool:
    """Whether files of the repository differ from its commit."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str:
    """What git says of this code's repository; "" where there is none."""
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=_HERE, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def today() -> str:
    """The date, in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def machine() -> str:
    """This machine, in words."""
    cores = os.cpu_count() or 1
    return f"{platform.system()} {platform.machine()}, {cores} cores, Python {platform.python_version()}"
