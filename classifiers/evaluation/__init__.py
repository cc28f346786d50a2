"""Evaluation of predictions: scores, confidence intervals, paired tests, and the three tasks (one label, several, numbers)."""
