"""Rollout engines: one protocol, one file per backend."""
