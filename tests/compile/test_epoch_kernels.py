"""The step and epoch kernels, compiled for GPUs that are not here, do not spill and keep the order
of their memory accesses.

Each row of MATRIX has a process of its own, because pytest's kernels are interpreted:

    python -m tests.compile.test_epoch_kernels sm_90 adam ieee       # one JSON object a line
    python -m tests.compile.test_epoch_kernels sm_90 adam ieee "" 0,1  # at limits, see LIMITS
"""

import functools
import itertools
import json
import re
import sys

import pytest
import torch
import triton

from kernels import (
    RULES,
    Run,
    Spec,
    StepState,
    hyperparameters,
    launch,
    refusal,
    train_epoch,
    train_step,
)
from kernels.training.exchange import spills
from kernels.training.plan import plan
from tests import run_command
from tests.compile import worker
from tests.compile.test_compile import USUAL

# The cases of each architecture: (rule, precision), with "scheduled" if hyperparameters change at
# each step. The stack must be empty on the first two. On the others the kernels must compile.
MATRIX = {
    "sm_90": [
        ("sgd", "ieee"),
        ("sgd", "tf32x3"),
        ("sgd", "tf32"),
        ("adam", "ieee"),
        ("nesterov", "tf32"),
        ("adam", "tf32x3", "scheduled"),
    ],
    "sm_80": [
        ("sgd", "ieee"),
        ("sgd", "tf32x3"),
        ("sgd", "tf32"),
        ("sgd", "tf32x3", "scheduled"),
    ],
    "sm_100": [("sgd", "tf32x3")],
    "sm_120": [("sgd", "tf32")],
    "gfx942": [("sgd", "ieee")],
}
NO_STACK = ("sm_80", "sm_90")
# The largest networks and batches that are served, by precision. More layers need no more registers
# at the same time.
LIMITS = {
    "ieee": [((784, 256, 256, 32), 128), ((784, 256, 256, 64), 64)],
    "tf32": [((784, 256, 256, 16), 128), ((784, 256, 256, 64), 32)],
    "tf32x3": [((784, 256, 256, 32), 64), ((784, 256, 256, 64), 32)],
}
REFERENCE = (784, 100, 50, 10), 32


def exchanges(arch):
    """The exchanges that work on an architecture."""
    return ["counter"] if arch.startswith("gfx") else ["words", "counter"]


def launched(arch, rule, precision, scheduled="", limit=""):
    """Every launch of the reference network at batch 32, or of a limit.

    These are an epoch by one program, by several with each exchange, and a step.
    """
    torch.set_float32_matmul_precision(worker.PRECISIONS[precision][1])
    sizes, batch = LIMITS[precision][int(limit)] if limit else REFERENCE
    spec, rows = Spec(sizes, "sigmoid", rule=rule), 60_000
    empty = functools.partial(torch.empty, device="meta")
    hyper = hyperparameters(rule).to("meta")
    lists = [[empty(*shape) for shape in spec.shapes] for _ in range(1 + len(spec.rule.states))]
    run = Run(
        spec,
        lists[0],
        lists[1:],
        empty(rows, 784, dtype=torch.uint8),
        empty(rows, dtype=torch.int64),
        empty(rows, dtype=torch.int64),
        batch,
        hyper.repeat(-(-rows // batch), 1) if scheduled else hyper,
        empty(1),
        scale=1 / 255,
    )
    found = []
    with (
        launch.dry_run(arch, worker.SMS[arch]),
        launch.observe(lambda kernel, _, a, o: found.append((kernel, a, o))),
    ):
        train_epoch(run, programs=1)
        programs = triton.cdiv(sizes[1], plan(run, "exchange")[1])
        for exchange in exchanges(arch) if not spills(run) else ():
            train_epoch(run, programs=programs, exchange=exchange)
        train_step(StepState(run))
    return found


def describe(arch, rule, precision, scheduled="", limits=""):
    """For every launch, `worker`'s description and the accesses that moved across a barrier between
    Triton's two IRs.

    limits: none for the reference network, or numbers of LIMITS with a comma between two.
    """
    for limit in limits.split(","):
        for kernel, args, options in launched(arch, rule, precision, scheduled, limit):
            said = described(arch, f"{kernel.__name__}, {rule}", precision, kernel, args, options)
            yield said | {"limit": limit}


def described(arch, label, precision, kernel, args, options):
    """`describe` of one launch."""
    source, compiled_with = worker.as_source(kernel, args, options)
    said = worker.compile_and_describe(arch, label, precision, source, compiled_with)
    if "error" not in said:
        asm = triton.compile(
            source, target=worker.target(arch), options=compiled_with
        ).asm  # from the cache
        before, after = accesses(asm["ttir"]), accesses(asm["ttgir"])
        said["moved"] = sorted(map(str, before ^ after))
        said["polls"] = sum(kind == "load" and root.startswith("box") for kind, root, _ in before)
        said["waits"] = asm["ttgir"].count("scf.while")
    return said


def accesses(ir):
    """{(kind, argument, segment)} of global loads and stores. A barrier, atomic or wait starts a
    new segment.
    """
    parents, found, segment = {}, set(), 0
    for line in ir.splitlines():
        line = line.split(" loc(")[0]
        for name, start in re.findall(
            r"(%[\w.]+) = (%[\w.#]+)", line
        ):  # iter_args and while's initial values
            parents[name] = [start]
        defined = re.match(r"\s*(%[\w.]+)(?::\d+)? = ([\w.]+)(.*)", line)
        if defined and defined[2] not in ("scf.for", "scf.while"):
            operands = re.findall(r"%[\w.#]+", defined[3])
            parents[defined[1]] = operands[:1] if defined[2] == "tt.addptr" else operands
        if re.search(r"\b(gpu|ttg)\.barrier|tt\.atomic_rmw|scf\.while", line):
            segment += 1
        access = re.search(r"(tt\.load|ttg\.async_copy_global_to_local|tt\.store) (%[\w.#]+)", line)
        access = access or re.search(
            r"(\.buffer_load|\.buffer_store)\b[^\[]*?(%[\w.#]+)\[", line
        )  # AMD's
        if access:
            kind = "store" if "store" in access[1] else "load"
            found |= {(kind, root, segment) for root in roots(access[2], parents)}
    return found


def roots(name, parents):
    """The kernel's arguments that a pointer comes from."""
    name = name.split("#")[0]
    if name not in parents:
        return {name.lstrip("%")}
    return set().union(*(roots(parent, parents) for parent in parents[name]))


def test_a_load_above_the_exchange_is_seen():
    text = """tt.func @k(%box_ptr, %y_ptr) {
      %p = tt.addptr %y_ptr, %offs
      {}
      %w:2 = scf.while (%x = %init) : (i64) -> i64 {
      gpu.barrier
      {}"""
    load = "%y = tt.load %p, %mask : tensor<4x!tt.ptr<f32>>"
    (below,), (above,) = (
        accesses(text.replace("{}", a, 1).replace("{}", b)) for a, b in (("", load), (load, ""))
    )
    assert below == ("load", "y_ptr", 2) and above == ("load", "y_ptr", 0)


def limited(arch, precision):
    """The names of rules that are compiled at the limits: those with the most states, each of which
    is one more tile in registers. In torch's default precision on an H100, it is every rule.
    """
    most = (
        0 if (arch, precision) == ("sm_90", "ieee") else max(len(r.states) for r in RULES.values())
    )
    return [name for name, rule in RULES.items() if len(rule.states) >= most]


def cases():
    """Every row of MATRIX, and the limits with the rules that `limited` names.

    Without --full, only the first row of the usual architectures runs.
    """
    for arch, rows in MATRIX.items():
        for row in rows:
            usual = arch in USUAL and row in rows[:1]
            marks = [pytest.mark.long(10)] + ([] if usual else [pytest.mark.full])
            yield pytest.param(arch, row, marks=marks, id="-".join((arch, *row)))
    for arch, precision in itertools.product(NO_STACK, LIMITS):
        limits = ",".join(map(str, range(len(LIMITS[precision]))))
        for rule in limited(arch, precision):
            row, name = (rule, precision, "", limits), f"{arch}-{rule}-{precision}-limits"
            marks = [pytest.mark.long(25), pytest.mark.full]
            yield pytest.param(arch, row, marks=marks, id=name)


@pytest.mark.parametrize("precision", LIMITS)
def test_the_limits_are_the_largest_that_are_served(precision, monkeypatch):
    setting = worker.PRECISIONS[precision][1]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    for sizes, batch in LIMITS[precision]:
        features, width, *rest, classes = sizes
        assert refusal(Spec(sizes), batch) is None
        assert refusal(Spec(sizes), batch + 1)
        assert refusal(Spec((features, width + 1, *rest, classes)), batch)
        assert refusal(Spec((features, width, *rest, classes + 1)), batch)


@pytest.mark.parametrize(("arch", "row"), list(cases()))
def test_kernels_compile_without_spills_and_keep_their_order(arch, row, environment):
    module = "tests.compile.test_epoch_kernels"
    command = [sys.executable, "-W", "ignore", "-m", module, arch, *row]
    done = run_command(command, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    limits = row[3].split(",") if row[3:] else [""]
    assert {kernel["limit"] for kernel in rows} == set(limits)
    for limit in limits:
        check(arch, limit, [kernel for kernel in rows if kernel["limit"] == limit])


def check(arch, limit, found):
    """Asserts all claims about the kernels of the reference network, or of one limit."""
    shared = [kernel for kernel in found if kernel["label"].startswith("exchange")]
    # At a limit where they would spill there are none, see `configs.most_shared`.
    assert len(shared) == len(exchanges(arch)) or (limit and not shared)
    assert len(found) == 3 + len(shared)
    for kernel in found:
        assert "error" not in kernel, kernel
        assert kernel["moved"] == [], kernel
        assert not kernel.get("uneven"), kernel  # on NVIDIA: see worker.uneven_sums
        assert (kernel["polls"] > 0) == kernel["label"].startswith("exchange"), kernel
        if arch in NO_STACK:
            assert (kernel["stack"], kernel["local"]) == (0, 0), kernel
    # each exchange kernel has one
    assert sum(kernel["waits"] for kernel in found) == len(shared)


if __name__ == "__main__":
    for kernel in describe(*sys.argv[1:]):
        print(json.dumps(kernel), flush=True)
