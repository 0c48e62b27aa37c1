"""Environments of the embedded task that go wrong, each in its own way."""
