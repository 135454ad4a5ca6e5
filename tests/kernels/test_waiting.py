"""How threads of compiled code hand numbers to each other, also on processors that are not x86.

An x86 processor shows another core its writes in their order, whatever the code says. On others, a
missing order would give wrong numbers now and then. So these tests read the code.
"""

import re

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="needs numba: pip install 'handgrad[cpu]'")

from llvmlite import binding  # noqa: E402

from kernels.cpu import waiting  # noqa: E402

ARM = "aarch64-unknown-linux-gnu"


@pytest.fixture(scope="module")
def code():
    """LLVM's code of a loop that writes a number and then meets the other workers."""

    @numba.njit(nogil=True, error_model="numpy")
    def write_and_meet(counter, workers, count, to):
        meetings, numbers = 1, waiting.integers(to)
        for i in range(count):
            numbers[0] += i
            meetings = waiting.meet(counter, workers, meetings)

    memory = np.zeros(2, np.int64)
    write_and_meet(np.int64(memory.ctypes.data), 1, 5, np.int64(memory[1:].ctypes.data))
    assert memory.tolist() == [0, 10], "one worker waits for nobody"
    return write_and_meet.inspect_llvm(write_and_meet.signatures[0])


def test_a_meeting_orders_what_threads_write_and_read(code):
    adds, loads = re.findall(r"atomicrmw add .*", code), re.findall(r"load atomic .*", code)
    assert adds and loads
    assert all(" seq_cst" in line for line in (*adds, *loads))


def test_on_arm_a_meeting_releases_writes_and_acquires_reads(code):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(ARM)
    code = code.replace("void @llvm.x86.sse2.pause()", "void @llvm.aarch64.hint(i32 1)")
    code = code.replace(
        "declare void @llvm.aarch64.hint(i32 1)", "declare void @llvm.aarch64.hint(i32)"
    )
    code = re.sub(r'target datalayout = ".*"', "", code)
    code = re.sub(r'target triple = ".*"', f'target triple = "{ARM}"', code)
    machine = target.create_target_machine(cpu="neoverse-n1", opt=3)
    assembly = machine.emit_assembly(binding.parse_assembly(code))
    # ldaddal adds, after all writes before it and before all reads behind it. ldar reads first.
    assert "\tldaddal\t" in assembly
    assert "\tldar\t" in assembly
    assert not re.search(r"\tldadd[al]?\t", assembly), "an addition without both orders"
    assert "\tyield" in assembly, "a waiting thread tells the processor"
