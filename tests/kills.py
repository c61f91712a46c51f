"""Kills runs at random moments, a hundred times, and compares what they end in with undisturbed runs.

    python tests/kills.py --kills=100 --folder=/tmp/kills

Training (a quantized model, its optimizer's state in pages), a sweep of two workers, and a report made of
records: each is killed by SIGKILL or SIGTERM somewhere between its start and its end, which is during its
first compilation, a step, a checkpoint or a record, and the same command goes on, until it ends.
"""

import argparse
import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENDS = {0, 75, -signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of run: its module and flags, what it ends in, and what it starts from."""

    name: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda folder: None

    def command(self, folder: Path) -> list[str]:
        return [sys.executable, "-m", *self.arguments, f"--workdir={folder}"]

    def ends_in(self, folder: Path) -> dict[str, bytes]:
        paths = (path for pattern in self.results for path in sorted(folder.glob(pattern)))
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def kinds(folder: Path) -> list[Kind]:
    """Training, a sweep, and the report of the sweep that was not disturbed."""
    sweep = (
        "experiments.ptq_overtraining",
        "--preset=smoke",
        "--workers=2",
        "--config.seeds=1",
        "--config.schedules=('wsd',)",
    )
    records = ("trials/*.json", "summary.json")

    def copied(target: Path) -> None:
        shutil.copytree(folder / "sweep-undisturbed", target)
        for name in ("summary.json", "report.html"):
            (target / name).unlink()

    training = (
        "experiments.train",
        "--preset=smoke",
        "--config.recipe=int8_train",
        "--config.state=fixed-5",
        "--config.checkpoint_every=10",
        "--config.log_every=5",
    )
    return [
        Kind("training", training, ("metrics.json", "result.json")),
        Kind("sweep", sweep, records),
        Kind("report", sweep, (*records, "report.html"), copied),
    ]


def finished(kind: Kind, folder: Path) -> float:
    """Runs to the end; seconds that it took."""
    start = time.monotonic()
    done = subprocess.run(kind.command(folder), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.monotonic() - start


def disturbed(kind: Kind, folder: Path, seconds: float, rng: random.Random, most: int) -> Counter:
    """Kills a run again and again until it ends by itself, or was killed so often; then lets it end."""
    kills = Counter()
    while kills.total() < most:
        process = subprocess.Popen(
            kind.command(folder),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        try:
            _, said = process.communicate(timeout=rng.uniform(0.02, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            _, said = process.communicate()
            kills[number.name] += 1
        if process.returncode not in ENDS:
            raise SystemExit(f"{kind.name} ended with {process.returncode}: {said[-2000:]}")
        if process.returncode == 0:
            return kills
    finished(kind, folder)
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, count = random.Random(options.seed), Counter()
    seconds, expected = {}, {}
    for kind in kinds(options.folder):
        undisturbed = options.folder / f"{kind.name}-undisturbed"
        kind.prepare(undisturbed)
        seconds[kind.name] = finished(kind, undisturbed)
        expected[kind.name] = kind.ends_in(undisturbed)
    runs = 0
    while count.total() < options.kills:
        kind = kinds(options.folder)[runs % 3]
        folder = options.folder / f"{kind.name}-{runs}"
        kind.prepare(folder)
        most = min(8, options.kills - count.total())
        for name, times in disturbed(kind, folder, seconds[kind.name], rng, most).items():
            count[f"{kind.name} by {name}"] += times
        found = kind.ends_in(folder)
        if found != expected[kind.name]:
            names = [n for n in expected[kind.name] if found.get(n) != expected[kind.name][n]]
            raise SystemExit(f"{folder} ended in another {', '.join(names)}")
        shutil.rmtree(folder)
        runs += 1
        print(f"{count.total()} kills, {runs} runs alike", flush=True)
    for name, times in sorted(count.items()):
        print(f"{name}: {times}")
    print(f"{count.total()} kills; all of {runs} runs ended in the bytes of the undisturbed ones")


if __name__ == "__main__":
    main()
