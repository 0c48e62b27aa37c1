"""Commands, one file each, and the recipes, records and loggers that all packages use."""
