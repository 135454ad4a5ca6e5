"""A plugin of pytest, which conftest.py loads. The longest tests run first. A test that hangs is
named. A report says which commands run the skipped tests, and which tests take too long.
"""

import collections
import faulthandler
import os
import re
import resource

import pytest

from tests import PATIENCE

# Seconds after which a test hangs. Most waits inside of a test end earlier, with a better message.
HANGS = 2 * PATIENCE
# Seconds of processor time for a test and the processes that it starts. The whole suite has six
# minutes on two cores.
BUDGET = 20.0
STDERR = pytest.StashKey[int]()  # a copy of stderr's file descriptor
CACHE = "handgrad/seconds"  # the key in pytest's cache of {test: seconds that it took last time}
# pattern of a reason to skip -> (what is missing, or None for the reason itself, how to run the
# tests). The first pattern that fits counts.
KINDS = {
    r"needs a (CUDA )?GPU|got empty parameter set": (
        "needs a GPU",
        "To run: on a machine with a GPU: python -m bench all --out results",
    ),
    "HANDGRAD_DATA": (
        "needs MNIST",
        "To run: HANDGRAD_DATA=FOLDER pytest -n auto; handgrad train mnist --data-dir FOLDER fills "
        "the folder",
    ),
    r"could not import|needs (numba|tqdm)": (None, 'To run: pip install -e ".[dev]"'),
    "Triton is not installed": ("needs Triton", "To run: on Linux: pip install triton"),
    "--full": ("takes minutes; needs --full", "To run: pytest -n auto --full"),
    r"C\+\+ compiler": ("needs a C++ compiler", "To run: apt install g++"),
    "C compiler": ("needs a C compiler", "To run: apt install gcc"),
    "in the interpreter": (
        "needs Triton's interpreter, which a machine with a GPU does not take by itself",
        "To run: TRITON_INTERPRET=1 pytest -n auto tests/kernels tests/proof",
    ),
    "machine without a GPU": (
        "needs a machine without a GPU",
        "To run: CUDA_VISIBLE_DEVICES= pytest -n auto tests/mlp",
    ),
    "without an Apple GPU": (
        "needs a machine without an Apple GPU",
        "To run: on Linux: pytest tests/mlp/test_apple.py",
    ),
    "on Linux only": (None, "To run: on Linux: pytest tests/mlp/test_windows.py"),
    "newer torch": ("needs a newer torch", "To run: pip install --upgrade torch triton"),
    "git checkout": ("needs a git checkout", "To run: git init && git add -A && pytest tests"),
    "two cores": (None, "To run: on Linux with two cores: pytest tests/mlp/test_cpu_epoch.py"),
    "by design": (
        "has no such case: an engine refuses that training, or torch or the data has none",
        "Nothing is missing; other tests check the refusals",
    ),
}


def pytest_addoption(parser):
    group = parser.getgroup("handgrad")
    group.addoption(
        "--full",
        action="store_true",
        help="also run tests that take minutes, such as compilations for every architecture",
    )
    group.addoption(
        "--enforce-budget",
        action="store_true",
        help=f"fail if a test took more than {BUDGET:.0f} s of processor time",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes minutes, so it runs only with --full")
    config.addinivalue_line("markers", "long(seconds): its usual time; the longest start first")
    # During a test, pytest sends what is written to stderr to a file of its own.
    config.stash[STDERR] = os.dup(2)


def pytest_unconfigure(config):
    os.close(config.stash[STDERR])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Ends this process if a test hangs, and prints where each thread is.

    pytest-xdist then reports that the test crashed its worker, and goes on in another one. A
    debugger, or pytest's own `-o faulthandler_timeout=SECONDS`, replaces this.
    """
    factor = 4 if item.get_closest_marker("full") else 1
    faulthandler.dump_traceback_later(HANGS * factor, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With pytest -n, a process without tests takes some from another."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(config, items):
    """Sorts the longest tests first, by their last time here or by their mark.

    So no process has a long test left when the others have finished.
    """
    for item in items:
        # If processes name a test differently, they cannot share work, and it cannot run alone.
        if " at 0x" in item.nodeid or len(item.name) > 200:
            raise pytest.UsageError(f"give this test plain ids: {item.nodeid[:300]}")
    measured = known(config)

    def seconds(item):
        marker = item.get_closest_marker("long")
        return measured.get(item.nodeid, marker.args[0] if marker else 0.0)

    for item in items:
        if item.get_closest_marker("full") and not config.getoption("full"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; needs --full"))
    # Short tests keep their order.
    items.sort(key=lambda item: -max(seconds(item), 1.0))


def known(config) -> dict[str, float]:
    """{test: seconds that it took last time}.

    All workers of xdist must sort alike, so they get it from the process that started them.
    """
    if hasattr(config, "workerinput"):
        return config.workerinput[CACHE]
    return config.cache.get(CACHE, {}) if hasattr(config, "cache") else {}


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput[CACHE] = known(node.config)


def processor_seconds() -> float:
    """Processor time of this process and of those that it started and waited for."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = processor_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append(("processor seconds", processor_seconds() - before))


def taken(config) -> dict[str, float]:
    """{test: processor seconds} of the tests that ran."""
    stats = config.pluginmanager.get_plugin("terminalreporter").stats
    reports = [r for rs in stats.values() for r in rs if getattr(r, "when", "") == "call"]
    properties = {r.nodeid: dict(r.user_properties) for r in reports}
    return {test: p["processor seconds"] for test, p in properties.items() if p}


def over_budget(seconds: dict[str, float], config) -> list[str]:
    """The tests that took too long. With --full they may."""
    return [] if config.getoption("full") else [t for t, s in seconds.items() if s > BUDGET]


def pytest_sessionfinish(session):
    config = session.config
    if hasattr(config, "workerinput") or not config.pluginmanager.has_plugin("terminalreporter"):
        return
    seconds = taken(config)
    if hasattr(config, "cache"):
        latest = known(config) | {test: round(s, 1) for test, s in seconds.items()}
        config.cache.set(CACHE, {test: s for test, s in latest.items() if s >= 1})
    if config.getoption("enforce_budget") and over_budget(seconds, config):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    write, seconds = terminalreporter.write_line, taken(config)
    write(f"{len(seconds)} tests took {sum(seconds.values()):.0f} s of processor time")
    for text, count in skipped(terminalreporter).most_common():
        write(f"skipped {count}: {text}")
    for test in over_budget(seconds, config):
        write(f"over the budget of {BUDGET:.0f} s of processor time: {test}, {seconds[test]:.0f} s")


def skipped(terminalreporter) -> collections.Counter:
    """{what was missing and how to get it: number of tests}."""
    reports = terminalreporter.stats.get("skipped", [])
    return collections.Counter(kind(r.longrepr[2].removeprefix("Skipped: ")) for r in reports)


def kind(reason: str) -> str:
    """The line for a reason to skip, or the reason itself if no pattern fits."""
    for pattern, (missing, remedy) in KINDS.items():
        if re.search(pattern, reason):
            return f"{missing or reason}. {remedy}"
    return reason
