"""A grid whose programs wait for each other, in the interpreter: every program is a process, on
tensors in shared memory.
"""

import multiprocessing
import time

from triton.runtime.interpreter import InterpreterBuilder

from kernels.operations import flatten

PATIENCE = 60  # seconds for one launch; each takes one or two


def _wait(seconds):
    """Let this process sleep before it looks for another program's word; there are more programs
    than processors.
    """
    load, add = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_atomic_rmw
    InterpreterBuilder.create_masked_load = lambda *args: (
        time.sleep(seconds if args[-1] else 0),
        load(*args),
    )[1]  # volatile
    InterpreterBuilder.create_atomic_rmw = lambda *args: (time.sleep(seconds), add(*args))[1]


def as_processes(kernel, programs: int, args, options, first: float) -> None:
    """`kernel[(programs,)](*args, 0, **options)`; the last argument is what counts a program's
    number from.

    first: seconds that program 0 sleeps before each look, so that the others are ahead of it as far
    as the exchange lets them.
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
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * programs, (
        f"{programs} programs ended with {codes}; None is one that still waits"
    )
