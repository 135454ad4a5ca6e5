"""Benchmarks: `python -m bench [NAME …] [--out DIR]`."""
