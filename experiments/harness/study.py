"""A study as data, and its binary: trials that run where flags say, and a report of their records."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.harness.reporting import provenance
from experiments.harness.reporting.provenance import Source
from experiments.harness.running import cli, ray_launcher, record_store, trials
from experiments.harness.running.trials import Launch
from experiments.harness.training import sharding

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Finished:
    """The input of a report.

    Attributes:
        config: of the grid.
        workdir: where the report goes.
        trials: the whole grid.
        records: of those that are finished, in the order of the trials.
        is_whole: whether this job ran all of them, and not one shard of several.
        source: of the records, for the report.
    """

    config: Any
    workdir: Path
    trials: Sequence[Any]
    records: list[dict]
    is_whole: bool
    source: Source | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: its question, its grid, one trial of it, and the report.

    Attributes:
        name: of the folder of its code, of its records, and of its workdirs.
        question: in one sentence.
        papers: what it tests, by arXiv's numbers; () where there is none.
        presets: configs by name, dataclasses that are not frozen, as flags set their fields.  A field
            ``workers`` is the number of processes, 1 where there is none.
        costs: what each preset takes, in words.
        make_trials: from a config to the distinct trials of its grid; raises ValueErrors for bad configs.
        run_trial: a module's function, from (trial, context) to the record's results.
        cost: work of a trial, in any unit.
        compile_key: a module's function of a trial; trials with equal keys run the same compiled programs.
        report: writes the report of a `Finished`, and returns the summary.
        to_text: the summary in words.
        batches: from a config to names of its fields that divide over the devices.
    """

    name: str
    question: str
    papers: tuple[str, ...]
    presets: Mapping[str, Any]
    costs: Mapping[str, str]
    make_trials: Callable[[Any], Sequence[Any]]
    run_trial: trials.RunTrial
    cost: Callable[[Any], float]
    compile_key: Callable[[Any], Any]
    report: Callable[[Finished], dict]
    to_text: Callable[[dict], str]
    batches: Callable[[Any], Sequence[str]] = lambda config: ()

    def __post_init__(self):
        if not self.presets:
            raise ValueError(f"study {self.name!r}: presets needs at least one config; got none")
        for name, config in self.presets.items():
            if not dataclasses.is_dataclass(config) or isinstance(config, type):
                raise ValueError(
                    f"study {self.name!r}: presets[{name!r}] must be an instance of a dataclass; "
                    f"got {config!r}"
                )
            if config.__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]
                raise ValueError(
                    f"study {self.name!r}: presets[{name!r}] must not be frozen, for flags set its fields; "
                    f"write @dataclasses.dataclass above {type(config).__name__}"
                )
        if set(self.costs) != set(self.presets):
            raise ValueError(
                f"study {self.name!r}: costs needs the names of presets, {', '.join(self.presets)}; "
                f"got {', '.join(self.costs) or 'none'}"
            )

    @property
    def default(self) -> str:
        """The preset of the binary where none is given: "laptop" if there is one, else the first."""
        return "laptop" if "laptop" in self.presets else next(iter(self.presets))

    def run(self, config: Any, workdir: str | Path, launch: Launch = trials.HERE) -> dict:
        """Runs what has no record yet, writes the report, and returns the summary.

        One shard of several, as long as no trial has a record, writes no report and returns {}.

        Args:
            config: one of `presets`, or any.
            workdir: where records, ``summary.json`` and ``report.html`` go.
            launch: where trials run.

        Raises:
            ValueError: bad input.
            RuntimeError: a trial failed.
        """
        grid = self.make_trials(config)
        self._check_grid(grid)
        self._check_batches(config)
        store = record_store.RecordStore(workdir, self.name)
        store.check_grid(grid)
        records = trials.run(
            grid,
            self.run_trial,
            store,
            cost=self.cost,
            compile_key=self.compile_key,
            launch=launch,
            workers=getattr(config, "workers", 1),
        )
        is_whole = launch.shard[1] == 1
        if not records and not is_whole:
            return {}
        source = dataclasses.replace(self.source(config), seeds=provenance.seeds(records))
        return self.report(Finished(config, store.workdir, grid, records, is_whole, source))

    def source(self, config: Any) -> Source:
        """Where a report of a config comes from."""
        command = provenance.command(self.name, self.presets, config)
        return Source(self.name, self.question, self.papers, command)

    def load(self, workdir: str | Path) -> list[dict]:
        """Returns the records that lie in a folder.

        Raises:
            ValueError: no record of this study lies there.
        """
        return record_store.read_records(workdir, self.name)

    def main(self) -> None:
        """Runs the binary: parses flags, runs the study and prints its result."""
        define_study_flags(self.name)

        def run_and_say(config: Any) -> None:
            workdir = FLAGS.workdir or f"runs/{self.name}/{FLAGS.preset}"
            summary = self.run(config, workdir, _launch())
            if not summary:
                print(
                    f"Shard {FLAGS.shard} has no trial to run, and no trial has a record yet: no report."
                )
                return
            print(self.to_text(summary))
            print(f"report: {str(workdir).rstrip('/')}/report.html")

        cli.main(run_and_say, self.presets, default=self.default, about=self.about())

    def about(self) -> str:
        """Returns the question, where it comes from, and what each preset takes."""
        width = max(map(len, self.presets))
        presets = (f"  --preset={name:<{width}}  {self.costs[name]}" for name in self.presets)
        papers = [f"Papers: {', '.join(self.papers)}."] if self.papers else []
        return "\n".join([self.question, *papers, "", *presets])

    def _check_grid(self, grid: Sequence[Any]) -> None:
        if not grid:
            raise ValueError(f"study {self.name!r}: make_trials gave no trial for this config")
        counts = collections.Counter(map(record_store.trial_id, grid))
        twice = [t for t in grid if counts.pop(record_store.trial_id(t), 1) > 1]
        if twice:
            named = ", ".join(map(str, twice[:3])) + (" and more" if len(twice) > 3 else "")
            raise ValueError(
                f"study {self.name!r}: make_trials must give each trial once; {len(twice)} come up again: "
                f"{named}"
            )

    def _check_batches(self, config: Any) -> None:
        axes = (getattr(config, "mesh_data", 1), getattr(config, "mesh_fsdp", -1))
        for name in self.batches(config):
            devices, batch = sharding.make_mesh(*axes).size, getattr(config, name)
            if batch % devices:
                raise ValueError(
                    f"config.{name} {batch} does not divide over {devices} devices; give a multiple"
                )


def _launch() -> Launch:
    cluster = None
    if FLAGS.launcher == "ray":
        if FLAGS.workers is not None:
            raise ValueError(
                "--workers are of this machine; with --launcher=ray see --ray_resources"
            )
        resources = ray_launcher.parse_resources(FLAGS.ray_resources)
        cluster = ray_launcher.Ray(FLAGS.ray_address, resources, FLAGS.ray_retries)
    shard = parse_shard(FLAGS.shard)
    return Launch(FLAGS.workers, shard, FLAGS.keep_checkpoints, cluster)


def define_study_flags(study: str) -> None:
    """Defines the flags that all studies share."""
    flags.DEFINE_string(
        "workdir", None, f"Folder of records and report; runs/{study}/PRESET where not given."
    )
    flags.DEFINE_integer(
        "workers", None, "Processes on this machine; the config's where not given."
    )
    flags.DEFINE_string(
        "shard", "0/1", "i/n: run every n-th trial from the i-th, as one of n jobs."
    )
    flags.DEFINE_enum(
        "launcher", "local", ["local", "ray"], "Where trials run: this machine, or a Ray cluster."
    )
    flags.DEFINE_string("ray_address", "auto", "Of the cluster; local makes one on this machine.")
    flags.DEFINE_string("ray_resources", "num_cpus=1", "Of a trial, as num_cpus=8,TPU=4.")
    flags.DEFINE_integer("ray_retries", 3, "Of a trial whose machine was lost.", lower_bound=0)
    flags.DEFINE_bool("keep_checkpoints", False, "Keep scratch folders of finished trials.")


def parse_shard(text: str) -> tuple[int, int]:
    """Returns i/n as numbers.

    Raises:
        ValueError: anything else, or i not below n.

    >>> parse_shard("2/8")
    (2, 8)
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard is i/n with 0 ≤ i < n, as in 0/4; got {text!r}")
    return int(index), int(count)
