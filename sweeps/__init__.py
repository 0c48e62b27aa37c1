"""Sweeps: Optuna decides, Ray Tune executes, the journal is the truth."""
