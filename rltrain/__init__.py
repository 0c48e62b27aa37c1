"""The LoRA reinforcement-learning trainer. Knows nothing of sweeps, Ray Tune or Optuna."""
