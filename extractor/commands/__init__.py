"""The commands about images and features: each parses, calls and prints."""
