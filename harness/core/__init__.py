"""Errors, paths, locks, the machine and the command line: what every other part may import."""
