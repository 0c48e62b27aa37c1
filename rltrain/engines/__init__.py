"""Rollout engines: one protocol, and one module per backend."""
