"""Statistics over seeds, configurations and held-out problems, apart from drawing and wording."""
