"""The commands about heads: each parses, calls and prints."""
