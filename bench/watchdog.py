"""Watches a child process that must keep showing signs of life. A child that hangs is killed and
reported.
"""

import json
import queue
import subprocess
import threading


def watch(command: list[str], patience: float, environment: dict | None = None) -> tuple[dict, str]:
    """Runs a command that prints JSON objects, one a line.

    Returns (the last object or {}, what went wrong). The second is "" if the command ended with
    status 0. patience: seconds without a line after which the command counts as hanging.
    """
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines, last = queue.Queue(), {}

    def forward():
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=forward, daemon=True)
    reader.start()
    wrong = ""
    try:
        while (line := lines.get(timeout=patience)) is not None:
            last = json.loads(line) if line.startswith("{") else last
    except queue.Empty:
        child.kill()
        wrong = f"hang: no sign of life for {patience:g} s"
    status = child.wait()
    reader.join()
    child.stdout.close()
    return last, wrong or (f"ended with status {status}" if status else "")
