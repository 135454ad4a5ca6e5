"""Benchmarks. Run `python -m bench NAME … [--out DIR]` or `python -m bench all --out DIR`."""
