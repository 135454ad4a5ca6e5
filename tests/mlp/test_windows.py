"""What Windows does differently, as far as Linux can imitate it."""

import os
import sys
from types import SimpleNamespace

import pytest

from mlp.data import guards
from mlp.runs import disk
from tests import run_command, uninterpreted

TABLE = "größe;stadt;preis\n" + "".join(
    f"{i / 4:.2f};{('Köln', 'Łódź')[i % 2]};{10 + i / 2:.2f}\n".replace(".", ",") for i in range(12)
)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/maps"), reason="Windows is imitated on Linux only"
)
def test_the_commands_as_on_windows(tmp_path):
    """Every command that writes a file works where the rules are those of Windows. What cp1252
    lacks is printed as an escape, and files have the same bytes as on Linux.
    """
    pytest.importorskip("typer")
    (tmp_path / "häuser.csv").write_text(TABLE, encoding="utf-8")
    (tmp_path / "new.csv").write_text("größe;stadt\n1,5;東京\n", encoding="utf-8")
    train = ("train", "--out", "run", "--log", "csv", "--device", "cpu")
    commands = [
        (*train, "häuser.csv", "--target", "preis", "--hidden", "4", "--epochs", "2"),
        (*train, "--resume", "--epochs", "3"),
        ("predict", "run", "new.csv"),
        ("report", "run", "--html"),
        ("export", "run", "net.pt"),
        ("sweep", "digits", "--hidden", "4", "--epochs", "1", "--replicas", "2", "--out", "all"),
        ("runs", "."),
    ]
    words = [word for command in commands for word in (*command, "then")]
    environment = {**uninterpreted(), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "tests.windows", *words[:-1]]
    done = run_command(command, cwd=tmp_path, env=environment, encoding="cp1252")
    assert done.returncode == 0 and "epoch   3" in done.stdout, done.stderr
    assert "training never saw \\u6771\\u4eac" in done.stderr
    assert b"\r\r" not in (tmp_path / "run" / "metrics.csv").read_bytes()
    assert b"\r" not in (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "häuser.csv" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_file_that_is_open_elsewhere(tmp_path, monkeypatch):
    """On Windows it cannot be replaced. A moment later it can, or one line says what to do."""
    monkeypatch.setattr(disk, "_WINDOWS", True)
    tries, replace = [], os.replace

    def refused(source, target):
        tries.append(target)
        if len(tries) < most:
            raise PermissionError(13, "used by another process")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    most = 3
    disk.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and len(tries) == 3
    monkeypatch.setattr(disk, "_PATIENCE", 0.1)
    most = 10**6
    with pytest.raises(PermissionError, match="another program has it open; close it there"):
        disk.write_text(tmp_path / "a", "newer")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "new"
    monkeypatch.setattr(disk, "_WINDOWS", False)
    with pytest.raises(PermissionError, match="used by another process"):
        disk.write_text(tmp_path / "a", "newer")


def test_memory_of_windows(monkeypatch):
    """It is the second number of what the system fills in."""
    import ctypes

    def fill(pointer):
        assert ctypes.sizeof(pointer._obj) == pointer._obj[0] == 64
        pointer._obj[1] = 3 * 2**30
        return known

    kernel = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    known = True
    assert guards.memory() == 3 * 2**30
    known = False
    assert guards.memory() == 2**34
