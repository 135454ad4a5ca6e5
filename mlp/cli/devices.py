"""`train --devices N`, and `torchrun … -m mlp train`: one process for each device.

The process of rank 0 prints messages and writes the run. The others only compute.
"""

import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from .options import Values
from .versions import typed

_POLL = 0.1  # seconds between two checks of the processes
_PATIENCE = 5.0  # seconds in which the others may end after one has failed
_STARTED = "HANDGRAD_STARTED"  # a variable that only the processes of `start` have


def world() -> int:
    """The number of processes that torchrun, or `start`, has started for this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them, from 0 on."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """A context in which this process can communicate with the others.

    If `start` has started this process, it ends with that one. At the end of the context, torch's
    threads for communication have ended. They could otherwise abort a process that ends, because
    they still hold a tensor ("terminate called without an active exception").
    """
    import torch
    import torch.distributed as dist

    from ..engines import shared  # noqa: F401  # before the group starts: it says why

    if _STARTED in os.environ:
        threading.Thread(target=_follow, daemon=True).start()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # their variables hold the model
        raise
    finally:
        gc.collect()  # the model in DistributedDataParallel holds the group
        dist.destroy_process_group()


def _follow() -> None:
    """End this process when the one that started it ends, even if that one is killed.

    Then the operating system closes the other end of the pipe that is stdin here.
    """
    while os.read(0, 1):
        pass
    os._exit(1)


def start(values: Values) -> None:
    """Run this command in one process for each device. ValueError if a process fails.

    The processes end if this one ends.
    """
    count = values["devices"]
    if values["seeds"] is not None:
        raise ValueError("--seeds trains on one device; leave --devices out")
    port = _port()
    processes = [_process(i, count, port) for i in range(count)]
    try:
        died = _watch(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # closes the pipe, too
    if died is not None:
        status = processes[died].returncode
        raise ValueError(
            f"process {died} of {count} ended with status {status}, so the training ended; it goes "
            "on from its last epoch with --out RUN --resume"
        )


def _watch(processes: list[subprocess.Popen]) -> int | None:
    """Wait for all processes. Returns the number of the first that failed, or None.

    After a failure, the others have some seconds to print their errors.
    """
    while any(process.poll() is None for process in processes):
        failed = [i for i, process in enumerate(processes) if process.poll()]
        if failed:
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline and None in [p.poll() for p in processes]:
                time.sleep(_POLL)
            return failed[0]
        time.sleep(_POLL)
    return next((i for i, process in enumerate(processes) if process.returncode), None)


def _port() -> int:
    """The number of a free port of this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _process(index: int, count: int, port: int) -> subprocess.Popen:
    at = typed.index("--devices") if "--devices" in typed else None
    words = [word for word in typed[1:] if not word.startswith("--devices=")]
    if at is not None:
        words = typed[1:at] + typed[at + 2 :]
    threads = max(1, (os.cpu_count() or 1) // count)
    root = str(Path(__file__).parents[2])
    more = {
        _STARTED: "1",
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "mlp", *words]
    return subprocess.Popen(command, env={**os.environ, **more}, stdin=subprocess.PIPE)
