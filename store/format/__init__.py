"""The files of a cache: written whole, opened without trust. `store/FORMAT.md` says what is in them."""
