"""From run directories to tables, statistics, figures and the report. Reads files only."""
