"""The binary: python -m experiments.optimizer_states."""

from experiments.harness.running import study_cli
from experiments.optimizer_states import PRESETS, run, to_text
from experiments.optimizer_states.study import STUDY

if __name__ == "__main__":
    study_cli.study_main(STUDY, PRESETS, run, to_text)
