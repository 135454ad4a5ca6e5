"""Runs parts one after the other, each in a process of its own with a time limit. A part that fails
or hangs does not stop the others.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from . import summary
from .parts import ROOT, Part
from .table import one_line

GPU_SECONDS = 540.0  # the whole run's time on a GPU
_ENOUGH = 0.9  # a part starts if this share of its time is left
CPU_LIMIT = 1800.0  # seconds for one part without a GPU, where the whole run has no limit


def run(
    parts: list[Part], out: Path, skip=(), seconds: float | None = None, resume: bool = False
) -> int:
    """Runs the parts and rewrites the summary in `out` after each.

    Returns 1 if a part failed or timed out, else 0.

    seconds: of the whole run. A part may then use the time that later parts do not need. It starts
    only if nearly all of its own time is left. The first part always starts and may use all.
    resume: parts that passed before, on the same commit and machine, do not run again.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    page, started = summary.start([part.name for part in parts]), time.monotonic()
    kept = summary.passed(out, page) if resume else {}
    done = (*skip, *kept)
    running = [part for part in parts if part.name not in done and not part.reason]
    summary.write(page, out)
    for part, row in zip(parts, page["parts"]):
        if part in running:
            later = sum(p.seconds for p in running[running.index(part) + 1 :])
            left = None if seconds is None else seconds - (time.monotonic() - started)
            if left is not None and left < _ENOUGH * part.seconds and part is not running[0]:
                print(f"{part.name}: not started; go on with --resume", flush=True)
                continue
            limit = CPU_LIMIT if left is None else max(left - later, min(left, part.seconds))
            print(f"{part.name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
            row |= execute(part, limit, out)
        elif part.name in kept:
            row |= kept[part.name]
        else:
            row["status"] = summary.SKIPPED if part.name in skip else f"not run: {part.reason}"
        page |= {"seconds": time.monotonic() - started, "verdict": summary.verdict(page["parts"])}
        summary.write(page, out)
        print(f"{part.name}: {row['status']}  {row['headline']}", flush=True)
    return int(page["verdict"] == summary.FAILED)


def execute(part: Part, limit: float, out: Path) -> dict:
    """Runs one part and returns its status, seconds and headline. Its output goes to its log."""
    made, log = out / f"{part.name}.json", out / "logs" / f"{part.name}.log"
    made.unlink(missing_ok=True)  # from an earlier run
    started, status = time.monotonic(), None
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = summary.PASSED if process.wait(max(limit, 0)) == 0 else summary.FAILED
        except subprocess.TimeoutExpired:
            status = summary.TIMED_OUT
        finally:
            if status in (None, summary.TIMED_OUT):  # interrupted or too slow
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)  # ends its children, too
                else:  # Windows
                    process.kill()
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    table = (
        json.loads(made.read_text(encoding="utf-8")) if part.quote is None and made.exists() else {}
    )
    if table.get("not_run"):
        status = f"not run: {table['not_run']}"
    quoted = (
        table.get("failed") or table.get("headline", "") if part.quote is None else part.quote(text)
    )
    if status in (summary.FAILED, summary.TIMED_OUT) and not quoted:
        lines = [line for line in text.splitlines() if line.strip()]
        quoted = f"status {process.returncode}: {lines[-1].strip() if lines else 'printed nothing'}"
    if status == summary.TIMED_OUT:
        quoted = f"after {limit:.0f} s; {quoted}"
    return {
        "status": status,
        "seconds": time.monotonic() - started,
        "headline": one_line(quoted) if quoted else "",
    }
