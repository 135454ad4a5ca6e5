"""Each fault of tests/mutants.txt is found once and gives valid Python. `python -m tests.mutants`
checks that the suite notices the faults.
"""

import ast

from tests import mutants


def test_every_fault_is_found_and_parses():
    found = mutants.read()
    assert found
    for mutant in found:
        text = (mutants.ROOT / mutant.path).read_text()
        faulty = text[: mutant.start] + mutant.new + text[mutant.end :]
        assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(text)), mutant.fault


def test_layout_makes_no_difference():
    text = "def f(x):\n    return g(  # why\n        x.t(),\n        1.5,\n    )\n"
    ((start, end),) = mutants.find("g(x.t(), 1.5)", text)
    assert text[start:end].startswith("g(") and text[start:end].endswith(")")
    assert not mutants.find("g(x.t(), 1)", text)
    assert mutants.indented_as("    a()\n    if b:\n        c()", text, text.index("return")) == (
        "a()\n    if b:\n        c()"
    )
