"""Run directories read into tables, one row a run."""
