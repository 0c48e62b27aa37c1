"""What is quick on a CPU, and never on the path of a GPU."""
