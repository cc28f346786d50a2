"""Job files: what a scheduler runs, and the history of its runs."""
