"""A sweep's trials on Ray: which process trains what, and how it ends."""
