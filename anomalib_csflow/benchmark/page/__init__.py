"""The page of a benchmark: one self-contained file."""
