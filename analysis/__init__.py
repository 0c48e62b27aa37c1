"""Turn run directories into tables, statistics, figures and the report; it only reads files."""
