"""The binary: python -m experiments.optimizer_states."""

from experiments.optimizer_states import STUDY

if __name__ == "__main__":
    STUDY.main()
