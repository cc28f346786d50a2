"""The command line of an extraction."""
