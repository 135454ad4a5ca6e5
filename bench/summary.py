"""The summary of a run of `python -m bench all`, as summary.md for people and summary.json for
programs.
"""

import datetime
import json
import subprocess
from pathlib import Path

from .parts import ROOT
from .table import machine

WAITING, PASSED, FAILED, TIMED_OUT, SKIPPED = "waiting", "passed", "failed", "timed out", "skipped"


def commit() -> str:
    """The checked-out commit, with -dirty if files were changed, or "unknown" without git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def start(names: list[str]) -> dict:
    """The summary before anything ran, with every part as waiting."""
    parts = [{"part": name, "status": WAITING, "seconds": None, "headline": ""} for name in names]
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {
        "machine": machine(),
        "commit": commit(),
        "started": now,
        "seconds": 0.0,
        "verdict": WAITING,
        "parts": parts,
    }


def passed(folder: Path, now: dict) -> dict[str, dict]:
    """{name: row} of the parts that passed in the run whose summary is in `folder`.

    It is empty if that run was of another commit or machine.
    """
    try:
        before = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if any(before.get(fact) != now[fact] for fact in ("commit", "machine")):
        return {}
    return {row["part"]: row for row in before["parts"] if row["status"] == PASSED}


def verdict(parts: list[dict]) -> str:
    """FAILED if a part failed or timed out, WAITING if one has not run, else PASSED."""
    statuses = [part["status"] for part in parts]
    if FAILED in statuses or TIMED_OUT in statuses:
        return FAILED
    return WAITING if WAITING in statuses else PASSED


def write(summary: dict, folder: Path) -> None:
    """Writes summary.md and summary.json into `folder`.

    Each file is replaced at once, so a run that is cut off leaves whole files.
    """
    for name, text in (
        ("summary.json", json.dumps(summary, indent=1)),
        ("summary.md", markdown(summary)),
    ):
        fresh = folder / f"{name}.new"
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(folder / name)


def markdown(summary: dict) -> str:
    """The page as Markdown, with a row for each part."""
    words = {
        WAITING: "cut off, or still running",
        PASSED: "everything that ran here passed",
        FAILED: "something failed",
    }
    statuses = [part["status"] for part in summary["parts"]]
    ran = len([status for status in statuses if status in (PASSED, FAILED, TIMED_OUT)])
    where = (
        f"{ran} of {len(statuses)} parts ran; commit {summary['commit']}; {summary['started']}; "
        f"{summary['machine']}"
    )
    lines = [
        "# handgrad: `python -m bench all`",
        "",
        f"**{words[summary['verdict']]}**, after {summary['seconds']:.0f} s; {where}",
    ]
    lines += ["", "| part | status | seconds | headline |", "|---|---|---|---|"]
    for part in summary["parts"]:
        seconds = "–" if part["seconds"] is None else f"{part['seconds']:.1f}"
        lines.append(
            f"| {part['part']} | {part['status']} | {seconds} | {part['headline'] or '–'} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Each part's output is in `logs/PART.log`, each table in `NAME.md` and `NAME.json`.",
        ]
    )
