"""Advantages, losses, and the models that they train. Pure functions wherever possible."""
