"""Where a run's progress is shown: the console, W&B and TensorBoard."""
