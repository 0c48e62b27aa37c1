"""What a run leaves on disk: its directory, manifest and metrics."""
