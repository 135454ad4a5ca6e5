"""The tests and their shared helpers."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository
