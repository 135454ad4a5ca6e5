"""Benchmarks: `python -m bench NAME … [--out DIR]`, `python -m bench all --out DIR`."""
