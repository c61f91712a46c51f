"""Others' codes and optimizers, for comparison."""
