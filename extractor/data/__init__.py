"""What DATA means: where images are, what they are called, and how their bytes are read."""
