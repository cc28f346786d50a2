"""A saved head: its folder, what it predicts and how it does on held-out images, and its one-file form."""
