"""The binary: python -m experiments.training_precision."""

from experiments.training_precision import STUDY

if __name__ == "__main__":
    STUDY.main()
