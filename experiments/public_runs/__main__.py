"""What runs that others publish say by our forms, and whether our runs predict how their gap grows.

    python -m experiments.public_runs --quest=runs_for_scaling.json --quartet=plots.ipynb --workdir=DIR

`--quest` is for_plots/runs_for_scaling.json of https://github.com/IST-DASLab/QuEST (arXiv 2502.05003), and
`--quartet` is notebooks/plots.ipynb of https://github.com/IST-DASLab/Quartet (arXiv 2505.14669).  Writes
``summary.json``, ``fits.json`` (the same without others' runs), ``report.html`` and its figure.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from experiments.harness.running import cli
from experiments.public_runs import analysis, efficiencies, report

FLAGS = flags.FLAGS
_OURS = Path(__file__).parents[1] / "results" / "training_precision" / "full"


def define_flags() -> None:
    text = flags.DEFINE_string
    text("quest", None, "QuEST's runs: for_plots/runs_for_scaling.json of its repository.")
    text("quartet", None, "Quartet's runs: notebooks/plots.ipynb of its repository.")
    text("ours", None, "The workdir of a training_precision study; the committed one if not given.")
    flags.DEFINE_integer("bootstraps", efficiencies.BOOTSTRAPS, "Refits of each law.", 2)
    text("workdir", None, "Where summary.json and report.html go.")


def run(_: Any) -> None:
    """Reads, fits and reports."""
    for name in ("quest", "quartet", "workdir"):
        if not FLAGS[name].value:
            raise ValueError(f"--{name} must be given: {FLAGS[name].help}")
    tables = analysis.read(FLAGS.quest, FLAGS.quartet, FLAGS.ours or _OURS)
    workdir = Path(FLAGS.workdir)
    try:
        print(report.write(workdir, tables, analysis.analyse(tables, FLAGS.bootstraps)))
    except OSError as error:
        raise ValueError(f"workdir '{workdir}' cannot be written: {error.strerror}") from None
    print(f"report: {workdir / 'report.html'}")


@dataclasses.dataclass
class _Config:
    """It has flags of its own alone."""


if __name__ == "__main__":
    define_flags()
    cli.main(run, {"public_runs": _Config()}, default="public_runs")
