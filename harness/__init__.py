"""The front door: commands (one file each) and the records every layer writes."""
