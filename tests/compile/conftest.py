"""Fixtures of the tests that compile for GPUs which are not here."""

import tempfile

import pytest

from tests import uninterpreted


@pytest.fixture
def environment(request):
    """The environment of a process that compiles.

    With --full, its kernels do not stay in Triton's cache, where they would take 2 GB.
    """
    if not request.config.getoption("full"):
        yield uninterpreted()
        return
    with tempfile.TemporaryDirectory() as cache:
        yield {**uninterpreted(), "TRITON_CACHE_DIR": cache}
