"""Fast paths for CPUs; none of them runs on a GPU."""
