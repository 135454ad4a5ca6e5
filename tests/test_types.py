"""Every parameter and every result of a public function has a type. Compiled functions are left
out.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import kernels
import mlp

ROOT = Path(__file__).parents[1]
LAUNCHERS = ("_fwd", "_bwd", "_ref")
# numba compiles the functions of these modules.
COMPILED = {
    f"kernels.cpu.{name}"
    for name in ("dense", "doubles", "images", "language", "loop", "sparse", "tiles", "waiting")
}


def modules(package):
    """Every module of the package, except `__main__` and compiled ones."""
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith("__main__") and found.name not in COMPILED:
            yield importlib.import_module(found.name)


def public():
    """{name: function} of all our public functions and methods, each once."""
    both = (kernels, mlp)
    named = [(f"{p.__name__}.{name}", getattr(p, name)) for p in both for name in p.__all__]
    named += [(f"mlp.{name}", getattr(mlp, name)) for name in mlp.public.ESTIMATORS]
    for package in both:
        for module in modules(package):
            named += [
                (f"{module.__name__}.{name}", value)
                for name, value in vars(module).items()
                if getattr(value, "__module__", None) == module.__name__
                and not name.startswith("_")
                and (package is mlp or ".cpu" in module.__name__ or name.endswith(LAUNCHERS))
            ]
    found = {}
    for name, value in named:
        for label, function in [(name, value), *methods(name, value)]:
            function = inspect.unwrap(getattr(function, "__func__", function))
            if inspect.isfunction(function) and function.__module__.split(".")[0] in (
                "kernels",
                "mlp",
            ):
                found.setdefault(function, label)
    return {label: function for function, label in found.items()}


def methods(name, value):
    """(name, function) of a class's public methods, properties and constructor, as far as they are
    ours.
    """
    if not inspect.isclass(value):
        return
    for base in value.__mro__:
        if base.__module__.split(".")[0] not in ("kernels", "mlp"):
            continue
        for key, member in vars(base).items():
            if isinstance(member, property):
                member = member.fget
            if key == "__init__" or not key.startswith("_"):
                yield f"{name}.{key}", member


def untyped(function) -> list[str]:
    """The parameters of a function that have no type, and "return" if its result has none."""
    signature = inspect.signature(function)
    names = list(signature.parameters.values())
    first = "." in function.__qualname__ and names and names[0].name in ("self", "cls")
    missing = [p.name for p in names[bool(first) :] if p.annotation is inspect.Parameter.empty]
    if function.__name__ != "__init__" and signature.return_annotation is signature.empty:
        missing.append("return")
    return missing


FUNCTIONS = public()


@pytest.mark.parametrize("package", [kernels, mlp], ids=["kernels", "mlp"])
def test_every_public_function_is_typed(package):
    ours = {n: f for n, f in FUNCTIONS.items() if n.startswith(f"{package.__name__}.")}
    assert len(ours) > 60
    missing = {name: gaps for name, f in ours.items() if (gaps := untyped(f))}
    assert not missing, "\n".join(f"{name}: {', '.join(gaps)}" for name, gaps in missing.items())


def test_missing_types_are_counted():
    def partly(a: int, b, *c) -> None: ...

    assert untyped(partly) == ["b", "c"]
    assert untyped(lambda x: x) == ["x", "return"]


def test_types_are_installed():
    """Both packages have py.typed, and pyproject.toml includes it in a build."""
    for package in (kernels, mlp):
        assert Path(package.__path__[0], "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()
