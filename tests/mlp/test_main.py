"""The command line as a process: what it imports, and what it says when packages are missing."""

import re
import sys

import pytest

from kernels import selfcheck
from mlp.__main__ import main
from mlp.cli import options
from tests import run_command, uninterpreted


def test_help():
    """`python -m mlp --help` names the commands."""
    done = run_command([sys.executable, "-m", "mlp", "--help"])
    assert done.returncode == 0 and done.stderr == ""
    assert all(
        re.search(rf"^ +{name} ", done.stdout, re.M)
        for name in ("train", "evaluate", "predict", "recipes", "info")
    )


def test_help_imports_nothing_heavy():
    """--help of the program and of its largest command does not import torch."""
    code = (
        "import sys\n"
        "from mlp.__main__ import main\n"
        "assert main(['--help']) == main(['train', '--help']) == main(['--version']) == 0\n"
        "heavy = ('torch', 'triton', 'numpy', 'sklearn', 'matplotlib', 'tqdm')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = run_command([sys.executable, "-c", code])
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-2000:]


@pytest.mark.parametrize("columns", [80, 100])
def test_every_help_fits(columns, monkeypatch, capsys):
    """Each option is described in sentences, and no line is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([]) == 0
    listed = capsys.readouterr().out.partition("Commands:")[2]
    names = re.findall(r"^  (\w+)  .*\.$", listed, re.M)
    assert len(names) == len(listed.strip().splitlines()) > 10  # no description is cut short
    for name in names:
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= columns
    rows = [row for group in vars(options).values() if _is_rows(group) for row in group]
    assert len(rows) > 60
    for row in rows:
        assert re.match(r"[A-Z]|[a-z0-9]+[,:]? ", row.help) and row.help[-1] in ".…", row


def _is_rows(group):
    return isinstance(group, tuple) and all(isinstance(row, options.Option) for row in group)


def test_names_are_loaded_when_asked_for():
    """`import mlp` does not import torch. Every public name and submodule is still found, and no
    submodule hides a function.
    """
    code = (
        "import sys, mlp\n"
        "assert 'torch' not in sys.modules\n"
        "import mlp.fusing\n"
        "assert callable(mlp.fuse) and mlp.optim.SGD is mlp.SGD and 'Trainer' in dir(mlp)\n"
        "from mlp import *\n"
        "assert MLP is mlp.MLP and not hasattr(mlp, 'nothing') and not hasattr(mlp, '_nothing')\n"
        # These take a second to import, and `handgrad train digits` does not need them.
        "train, test = mlp.data.load('digits', verbose=False)\n"
        "trainer = mlp.Trainer(mlp.MLP([64, 10]), engine='manual', verbose=False)\n"
        "trainer.fit(train, 1, evaluate=test)\n"
        "trainer.load_state_dict(trainer.state_dict())\n"
        "slow = {'torch._dynamo', 'sklearn', 'scipy', 'pandas', 'numba', 'matplotlib'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = run_command([sys.executable, "-c", code], env=uninterpreted())
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.interpreter
def test_info(monkeypatch, capsys):
    """`info --check` prints versions, each operation's backend, and the self-check. Only two
    operations run here, to be quick.
    """
    monkeypatch.setattr(
        selfcheck,
        "OPERATIONS",
        {name: selfcheck.OPERATIONS[name] for name in ("linear", "elementwise_loss")},
    )
    status = main(["info", "--check"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, ""), out + err
    assert (
        re.search(r"handgrad .* torch \d", out)
        and "float64: " in out
        and "self-check: kernels" in out
    )
    assert "FAIL" not in out and re.search(r"^linear +float32 .* ok ", out, re.M)


@pytest.mark.interpreter
def test_failed_self_check(monkeypatch, capsys):
    """A failed self-check prints the table, then one line, and exits with 2."""
    row = selfcheck.Check("linear", "float32", "a case", 1.0, 1e-7, 3e-7)
    monkeypatch.setattr(selfcheck, "checks", lambda device, names: [row])
    assert main(["info", "--check"]) == 2
    out, err = capsys.readouterr()
    assert re.search("linear +float32 .* FAIL  a case\n$", out) and re.fullmatch(
        "handgrad: self-check failed: .*\n", err
    )


@pytest.mark.parametrize(
    "module, argv, what",
    [
        ("typer", "train", "the command line needs typer"),
        ("sklearn", "train digits", "the data set digits needs scikit-learn"),
        ("torchvision", "train mnist", "the data set mnist needs torchvision"),
        ("matplotlib", "train digits", "drawing curves.png needs matplotlib"),
        ("matplotlib", "search digits", "drawing search.png needs matplotlib"),
        ("matplotlib", "report a b", "drawing compare.png needs matplotlib"),
        ("matplotlib", "data digits --plots", "--plots needs matplotlib"),
        ("sklearn", "train mnist --plots", "drawing with --plots needs scikit-learn"),
        ("sklearn", "sweep mnist", "measuring networks needs scikit-learn"),
    ],
)
def test_missing_extra(module, argv, what, tmp_path, monkeypatch, capsys):
    """What is needed at the end of a training is missed at its start, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # its import then fails
    assert main(argv.split()) == 2
    assert (
        capsys.readouterr().err
        == f"handgrad: {what}: install the extra, pip install 'handgrad[train]'\n"
    )
    assert not list(tmp_path.iterdir())


def test_imports_without_the_extra():
    """`import mlp` needs no package of the extra. `import kernels` does not import mlp."""
    code = (
        "import sys\n"
        "import kernels\n"
        "assert 'mlp' not in sys.modules\n"
        "for name in ('typer', 'torchvision', 'sklearn', 'matplotlib', 'scipy', 'PIL'): "
        "sys.modules[name] = None\n"
        "import mlp\n"
        "mlp.MLP([4, 3])\n"
    )
    done = run_command([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
