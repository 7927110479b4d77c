"""The search with Optuna: space, study, trials, report. Needs training and tracking."""
