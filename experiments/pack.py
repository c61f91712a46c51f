"""Makes a study's records one table, to be kept: python -m experiments.pack --workdir=DIR.

DIR/trials/*.json and DIR/timings/*.json become DIR/records.jsonl, or records.jsonl.gz where that is larger
than a megabyte.  The study's command goes on from it, and rebuilds its report from it, as from single files.
"""

import dataclasses

from absl import flags

from experiments.harness.running import cli, packed

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing is to be set."""


def run(_: Config) -> None:
    if not FLAGS.workdir:
        raise ValueError("--workdir names the folder of a study; got none")
    table, count = packed.pack(FLAGS.workdir)
    print(f"{count} records: {table}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a study's records.")
    cli.main(run, {"default": Config()}, default="default")
