"""What a long command says while it works: which stage is under way, how far it is, and how long it will take."""
