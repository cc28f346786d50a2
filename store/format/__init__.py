"""The file formats of a cache: written atomically, checked when opened; `store/FORMAT.md` specifies them."""
