"""Models, their adapters, and their forward pass over packed sequences."""
