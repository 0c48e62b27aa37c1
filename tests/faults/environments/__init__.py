"""Environments of the embedded task that fail in different ways."""
