"""The rules of the layout, checked in the syntax tree: which package may import which, and what a
place must not hold.
"""

import ast
import functools
import graphlib
import importlib
import math
import sys
import types
from pathlib import Path

import pytest
import torch

import kernels
from kernels.activations import ACTIVATIONS
from kernels.losses import LOSSES
from kernels.operations import OPERATIONS
from tests import ROOT

PACKAGES = ("kernels", "mlp", "bench", "tests")
FILES = {
    str(path.relative_to(ROOT)): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
LIBRARY = [name for name in FILES if name.startswith(("kernels/", "mlp/"))]
KERNELS = [name for name in LIBRARY if name.startswith("kernels/")]
CPU = [name for name in KERNELS if name.startswith("kernels/cpu/")]
OPS = [name for name in KERNELS if name.startswith("kernels/ops/") and "__" not in name]


@functools.cache
def tree(name):
    """A file's syntax tree.

    Every process of the suite imports this file, so a tree is parsed only when a test asks for it.
    """
    return ast.parse(FILES[name].read_text(), name)


def imports(name, nodes=None):
    """The full names of the modules that a file imports, or that these nodes of its tree do.

    In kernels/ops/, `from ..tiles import cast` gives `kernels.tiles`.
    """
    package = Path(name).parent.parts
    for node in ast.walk(tree(name)) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*parents, *filter(None, [node.module])])
            # `from . import launch` imports a module, but `from .launch import run` a name in it.
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from ([n for n in names if module_exists(n)] or [base])


def module_exists(name):
    """True if the project has a file or folder for the module of this name."""
    path = name.replace(".", "/")
    return f"{path}.py" in FILES or f"{path}/__init__.py" in FILES


def ours(name):
    return {module for module in imports(name) if module.split(".")[0] in PACKAGES}


def attributes(tree):
    """All names in a tree: of variables, attributes, keywords and imports."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(getattr(node, field, None), str):
                yield getattr(node, field)


def is_jit(node):
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(d).startswith("triton.jit") for d in node.decorator_list
    )


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    allowed = {
        "kernels": ["kernels"],
        "mlp": ["mlp", "kernels"],
        "bench": ["bench", "mlp", "kernels"],
    }
    package = name.split("/")[0]
    found = {module.split(".")[0] for module in imports(name)}
    assert found & set(PACKAGES) <= set(allowed.get(package, PACKAGES))
    if package == "kernels":
        compilers = {"llvmlite", "numba", "numpy"} if name in CPU else set()
        if name == "kernels/language.py":  # the only one, because Triton may not be installed
            compilers = {"triton"}
        assert found <= {"kernels", "torch", *compilers, *sys.stdlib_module_names}
    if package == "mlp":
        assert "triton" not in found, "kernels belong into kernels/"


@pytest.mark.parametrize("name", sorted({*LIBRARY} - {*CPU}))
def test_compiled_code_of_the_cpu_is_imported_where_it_is_used(name):
    """numba is optional and slow to import, so only functions import what needs it."""
    at_import = [node for node in tree(name).body if isinstance(node, ast.Import | ast.ImportFrom)]
    compiled = {module for module in imports(name, at_import) if module.startswith("kernels.cpu")}
    assert compiled <= ({"kernels.cpu"} if name.startswith("mlp/") else set())


def outside_functions(nodes):
    """The imports among these statements and in their branches, such as `if TYPE_CHECKING`."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            yield from outside_functions([*node.body, *node.orelse])


def graph_of_imports(depth=None):
    """Module -> the modules that it imports outside functions. depth: parts of a name, or all."""
    graph = {}
    for name in LIBRARY:
        parts = name.removesuffix(".py").removesuffix("/__init__").split("/")
        found = imports(name, [*outside_functions(tree(name).body)])
        short = [".".join(one.split(".")[:depth]) for one in (".".join(parts), *found)]
        graph.setdefault(short[0], set()).update({*short[1:]} - {short[0]})
    return graph


def test_modules_import_each_other_without_a_circle():
    graph = graph_of_imports()
    assert graph["kernels.training.step"] >= {"kernels.launch", "kernels.training.run"}
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_folders_import_each_other_without_a_circle():
    """Whichever module of a folder is wanted, its __init__ is imported too."""
    graph = graph_of_imports(2)
    assert graph["mlp.runs"] >= {"mlp.data", "mlp.schema"} and "mlp.runs" not in graph["mlp.data"]
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("leaf", "may"),
    {
        "launch": set(),
        "activations": set(),
        "losses": {"kernels.activations"},
        "configs": {"kernels.launch"},
    }.items(),
)
def test_leaves_import_no_operation(leaf, may):
    assert ours(f"kernels/{leaf}.py") <= {"kernels.language", *may}


@pytest.mark.parametrize("name", KERNELS)
def test_operations_share_kernels_not_functions(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert not [alias.name for alias in node.names if alias.name.endswith("Function")]


@pytest.mark.parametrize("name", ["mlp/net.py", "mlp/loss.py", "mlp/optim.py"])
def test_manual_api_has_no_tape(name):
    assert not {
        "autograd",
        "requires_grad",
        "requires_grad_",
        "backward_hook",
        "nn",
        "torch.nn",
    } & set(attributes(tree(name)))


@pytest.mark.parametrize("name", LIBRARY)
def test_no_autotuner(name):
    assert not {"autotune", "Autotuner"} & set(attributes(tree(name))), (
        "configurations are fixed in kernels/configs.py"
    )


@pytest.mark.parametrize("name", [name for name in LIBRARY if name != "kernels/activations.py"])
def test_only_the_table_compares_names_of_activations(name):
    # "identity" means no activation, so code may compare with it.
    assert_compares_none_of(set(ACTIVATIONS) - {"identity"}, name, "kernels/activations.py")


@pytest.mark.parametrize("name", [name for name in LIBRARY if name != "kernels/losses.py"])
def test_only_the_table_compares_names_of_losses(name):
    assert_compares_none_of(set(LOSSES), name, "kernels/losses.py")


def assert_compares_none_of(names, file, table):
    """Checks that no comparison or match in the file contains one of these strings."""
    for node in ast.walk(tree(file)):
        compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        compared += [node.value] if isinstance(node, ast.MatchValue) else []
        strings = {n.value for c in compared for n in ast.walk(c) if isinstance(n, ast.Constant)}
        assert not strings & names, f"line {node.lineno}: ask the table in {table}"


@pytest.mark.parametrize("name", KERNELS)
def test_functions_of_autograd_hold_no_arithmetic(name):
    for cls in tree(name).body:
        if isinstance(cls, ast.ClassDef) and any(
            "Function" in ast.unparse(base) for base in cls.bases
        ):
            for node in ast.walk(cls):
                # (None,) * 4 and len(parameters) // 2 count arguments.
                counts = isinstance(node, ast.BinOp) and (
                    "(None,)" in ast.unparse(node) or "len(" in ast.unparse(node)
                )
                assert counts or not isinstance(node, ast.BinOp), (
                    f"{name}:{node.lineno}: {ast.unparse(node)}"
                )


@pytest.mark.parametrize("name", KERNELS)
def test_names_of_kernels(name):
    """A jit function that is launched is named …_kernel. No jit function calls one of that name."""
    for node in ast.walk(tree(name)):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "launch.run"
            and isinstance(node.args[0], ast.Name)
        ):
            assert node.args[0].id.endswith("kernel"), f"line {node.lineno}"
        if is_jit(node):
            called = {
                ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)
            }
            assert not [function for function in called if function.endswith("_kernel")]


# These files compute on the host.
HOST = ("kernels/selfcheck.py", "kernels/rounding.py", "kernels/rules.py", *CPU)


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in HOST])
def test_no_host_synchronisation(name):
    """No function waits for the GPU. The check of labels, which users ask for, may, and references
    may.
    """
    for function in tree(name).body:
        if (
            isinstance(function, ast.FunctionDef)
            and function.name != "check_range"
            and not function.name.endswith("_ref")
        ):
            waits = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero"}
            found = waits & {
                node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)
            }
            assert not found or "_ref(" in ast.unparse(function), f"{function.name}: {found}"


@pytest.mark.parametrize("package", [name for name in FILES if name.endswith("__init__.py")])
def test_names_of_modules_are_modules(package):
    """No package binds the name of one of its modules to anything else."""
    here = pytest.importorskip(Path(package).parent.as_posix().replace("/", "."))  # cli: typer
    for name, value in vars(here).copy().items():
        if module_exists(f"{here.__name__}.{name}"):
            assert isinstance(value, types.ModuleType), f"{here.__name__}.{name} is {value!r}"


def test_a_function_and_its_module():
    """`kernels.linear` is the function. The import of a module of that name fails."""
    assert OPS and callable(kernels.linear) and kernels.ops.linear.linear is kernels.linear
    assert all(isinstance(getattr(kernels.ops, Path(n).stem), types.ModuleType) for n in OPS)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'kernels\.linear'"):
        importlib.import_module("kernels.linear")


@pytest.mark.parametrize("name", KERNELS)
def test_every_operation_has_a_row(name):
    """Each forward launcher with a reference belongs to a row of kernels/operations.py."""
    functions = {n.name for n in tree(name).body if isinstance(n, ast.FunctionDef)}
    for function in functions:
        base = function.removesuffix("_fwd")
        if base != function and f"{base}_fwd_ref" in functions:
            assert base in OPERATIONS, f"{name}: {base} has no row in kernels/operations.py"
            definition = OPERATIONS[base].definition
            assert definition is not None and definition.fwd.__name__ == function


@pytest.mark.parametrize("name", OPS)
def test_every_operation_has_its_test(name):
    """tests/kernels/test_X.py tests kernels/ops/X.py. conv_bwd and patches are parts of conv."""
    stem = Path(name).stem
    tested = {"conv_bwd": "conv", "patches": "conv"}.get(stem, stem)
    assert f"tests/kernels/test_{tested}.py" in FILES


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_whole(name):
    """Each row's launchers, references and public function are names of `kernels`."""
    op = OPERATIONS[name]
    if op.bwd is None:
        assert {name, f"{name}_ref"} <= set(kernels.__all__)
        return
    for part in ("fwd", "fwd_ref", "bwd", "bwd_ref"):
        assert (
            getattr(kernels, f"{name}_{part}") is getattr(op, part)
            and f"{name}_{part}" in kernels.__all__
        )
    assert name in kernels.__all__ or f"{name}_loss" in kernels.__all__


@pytest.mark.parametrize("name", [name for name in LIBRARY if name.startswith("mlp/engines/")])
def test_engines_ask_two_things_of_an_optimizer(name):
    """Engines use only `update(grads)`, which takes a step, and `parts()`, which a kernel can
    update. All else is torch's interface.
    """
    torchs = {*dir(torch.optim.Optimizer), "param_groups", "state"}
    asked = {
        node.attr
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("optimizer")
    }
    assert asked - torchs <= {"update", "parts"}


ROWS = set(kernels.RULES) | set(kernels.LOSSES)
TABLES = ("kernels/rules.py", "kernels/losses.py")


@pytest.mark.parametrize("name", [name for name in LIBRARY if name not in TABLES])
def test_only_the_tables_compare_names_of_rules_and_losses(name):
    """No code chooses by comparing a rule's or loss's name, or by counting a rule's states."""
    for node in ast.walk(tree(name)):
        if not isinstance(node, ast.Compare):
            continue
        equal = all(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
        # `"momentum" in options` asks for a key, but `rule in ("sgd", "adam")` compares names.
        compared = [*node.comparators, *([node.left] if equal else [])]
        strings = {n.value for c in compared for n in ast.walk(c) if isinstance(n, ast.Constant)}
        text = ast.unparse(node)
        # scikit-learn's `solver` has values with the same names.
        assert not strings & ROWS or "solver" in text, f"line {node.lineno}: {text}: ask the row"
        counts = equal and "states)" in text and "len(" in text
        assert not (counts and strings), f"line {node.lineno}: {text}: ask the row"


# These take torch.optim's own arguments.
WIDE = ("sgd_ref", "adam_ref")


@pytest.mark.parametrize("name", KERNELS)
def test_functions_have_few_parameters(name):
    """A kernel has at most 13 parameters, a host function of training and rules at most 8."""
    most = 8 if name.startswith("kernels/training/") or name in TABLES[:1] else math.inf
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef) and node.name not in WIDE:
            count = sum(map(len, (node.args.posonlyargs, node.args.args, node.args.kwonlyargs)))
            assert count <= (13 if is_jit(node) else most), f"{node.name}: {count} parameters"
