"""Fixtures of the tests of mlp/."""

import pytest

from mlp.__main__ import main


@pytest.fixture
def handgrad(capsys):
    """The command line: `handgrad(*arguments)` gives (exit status, stdout, stderr)."""

    def run(*argv):
        status = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return status, out, err

    return run
