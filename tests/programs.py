"""Runs a grid whose programs wait for each other in the interpreter. Every program is a process,
and the tensors are in shared memory.
"""

import multiprocessing
import time
from multiprocessing import connection

from triton.runtime.interpreter import InterpreterBuilder

from kernels.operations import flatten
from tests import PATIENCE


def _wait(seconds):
    """Makes this process sleep before each look for another program's word, because there are more
    programs than processors.
    """
    load, add = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_atomic_rmw
    InterpreterBuilder.create_masked_load = lambda *args: (
        time.sleep(seconds if args[-1] else 0),
        load(*args),
    )[1]  # volatile
    InterpreterBuilder.create_atomic_rmw = lambda *args: (time.sleep(seconds), add(*args))[1]


def as_processes(kernel, programs: int, args, options, first: float) -> None:
    """Runs `kernel[(programs,)](*args, 0, **options)`. The last argument is the first program's
    number.

    first: seconds that program 0 sleeps before each look, so that the others get ahead of it as far
    as the exchange allows.
    """
    for tensor in flatten(args):
        tensor.share_memory_()

    def run(program):
        _wait(0.01 if program else first)
        kernel[(1,)](*args, program, **options)

    processes = [
        multiprocessing.get_context("fork").Process(target=run, args=(g,)) for g in range(programs)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    codes = [None] * programs
    # If one has failed, the others may wait for it without end.
    while None in codes and not any(codes) and time.monotonic() < end:
        running = [process.sentinel for process in processes if process.exitcode is None]
        connection.wait(running, timeout=1)
        codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * programs, (
        f"{programs} programs ended with {codes}; None is one that still waits"
    )
