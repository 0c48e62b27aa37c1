"""What commands need besides training: checks before a run, memory plans, export, comparison."""
