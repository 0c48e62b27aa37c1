"""Colours, marks, grids and rendering of all figures."""
