"""A sweep's search: its space, plan, Optuna study on a journal, and its trials' recipes."""
