"""A child process that must keep showing signs of life: one that hangs is killed and reported, not
waited for.
"""

import json
import queue
import subprocess
import threading


def watch(command: list[str], patience: float, environment: dict | None = None) -> tuple[dict, str]:
    """Run a command that prints JSON objects, one a line; returns the last one, {} if there is
    none, and what went wrong.

    patience: seconds without a line after which it counts as hanging. "" if the command ended with
    status 0.
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
