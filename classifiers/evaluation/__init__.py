"""What predictions are worth: scores, intervals, tests, and what differs between the three tasks."""
