"""The tests and their shared helpers."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository
# Seconds after which a test that waits for a thread or a process counts as hanging. It guards
# against hanging only: on a busy machine, every wait may take minutes.
PATIENCE = 900
