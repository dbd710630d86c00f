"""The table's promise: one row, two device functions of its name."""

from fastnn.activations import ACTIVATIONS
from fastnn.kernels import activations


def test_every_row_has_its_pair_of_device_functions_and_every_pair_its_row():
    public = {name for name in vars(activations) if not name.startswith("_") and name not in ("tl", "triton")}
    assert public == {name + ending for name in ACTIVATIONS for ending in ("", "_backward")}
