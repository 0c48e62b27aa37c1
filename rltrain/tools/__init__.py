"""What commands need besides training: checks, memory plans, export, comparison, reproduction."""
