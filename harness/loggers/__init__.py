"""Loggers show a run's metrics and samples: on the console, in W&B and in TensorBoard."""
