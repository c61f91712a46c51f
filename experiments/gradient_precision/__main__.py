"""The binary: python -m experiments.gradient_precision."""

from experiments.gradient_precision import STUDY

if __name__ == "__main__":
    STUDY.main()
