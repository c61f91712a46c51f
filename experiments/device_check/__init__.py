"""What a device is asked first: is it exact, what does it multiply, how fast is it, does it train?

    python -m experiments.device_check --workdir=DIR

takes nine minutes at most.  Each part runs in a process of its own with a limit of its own, and each answer
is a line of ``DIR/results.jsonl`` as soon as it is there.  A part that fails or is killed is named, and the
others go on.  The same command goes on where it was stopped.
"""

from experiments.device_check.running import run
from experiments.device_check.settings import PRESETS, Config

__all__ = ["PRESETS", "Config", "run"]
