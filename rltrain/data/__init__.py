"""Data files, batches of tokens and named random streams."""
