"""The table's promise: one row, two device functions of its name."""

import ast
from pathlib import Path

from fastnn.activations import ACTIVATIONS
from fastnn.kernels import activations


def test_every_row_has_its_pair_of_device_functions_and_every_pair_its_row():
    tree = ast.parse(Path(activations.__file__).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    public = {name for name in functions if not name.startswith("_")}
    assert public == {name + ending for name in ACTIVATIONS for ending in ("", "_backward")}
