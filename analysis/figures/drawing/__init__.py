"""What the figures share: colours, marks, grids and rendering."""
