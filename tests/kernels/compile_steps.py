"""Compiles the optimizers' launches without a GPU; prints a JSON row per launch. Run by test_steps.py and bench.

    python -m tests.kernels.compile_steps CAPABILITY [representative]

`representative`: two optimizers in two dtypes, what bench_compiled.py shows.
"""

import json
import sys
from collections.abc import Callable
from itertools import chain

import torch
from support.ahead_of_time import MULTIPROCESSORS, describe, stand_in_driver

from fastnn.kernels import gradient_norm
from fastnn.kernels.multi_tensor import Launcher, Step
from fastnn.kernels.tables import Tables

# (rule, which of its states are present, whether steps are counted)
RULES = [
    ("sgd", 0, False), ("sgd", 1, True), ("adam", 3, True), ("adam", 7, True), ("nadam", 3, True), ("rmsprop", 1, True),
    ("rmsprop", 7, True), ("adagrad", 1, True), ("adadelta", 3, True),
]  # fmt: skip
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, F32), (F16, F16, F16)]  # of parameter, gradient, states


REPRESENTATIVE = [(rule, dtypes) for dtypes in DTYPES[:2] for rule in (RULES[1], RULES[2])]


def main(capability: int, *selection: str) -> None:
    tables = Tables({}, [5000, 7], [0, 0], torch.device("cpu"), MULTIPROCESSORS[capability])
    tables.set_groups([0.0] * 9, [0] * 9)
    rows = []
    with stand_in_driver(capability) as launches:

        def note(**row) -> None:
            rows.extend({**row, **describe(launch)} for launch in launches)
            launches.clear()

        steps = [(rule, dtypes) for dtypes in DTYPES for rule in RULES]
        for (rule, present, counts), dtypes in REPRESENTATIVE if selection == ("representative",) else steps:
            Launcher(Step(rule, *dtypes, present, counts, False), tables)()
            note(rule=rule, present=present, dtypes=[dtype.itemsize for dtype in dtypes])
        if not selection:
            launch_extras(tables, note)
    json.dump(rows, sys.stdout)


def launch_extras(tables: Tables, note: Callable[..., None]) -> None:
    """Steps that are clipped, scaled and rounded at random; norms and clipping of their own."""
    scalar, partials = torch.zeros(()), torch.zeros(gradient_norm.partials_of(tables))
    for rule, present, dtypes in (("adam", 7, DTYPES[0]), ("nadam", 3, DTYPES[2])):
        launcher = Launcher(Step(rule, *dtypes, present, True, dtypes[0] == BF16), tables)
        launcher(1.0, partials, scalar, scalar, scalar)
        note(rule=rule, present=present, dtypes=[dtype.itemsize for dtype in dtypes], everything=True)
    for dtype, order in chain(((dtype, 2) for dtype in (F32, BF16, F16)), ((F32, 1), (F32, 0))):
        gradient_norm.add_up(tables, dtype, partials, order)
        note(order=order, dtypes=[dtype.itemsize])
        gradient_norm.clip(tables, dtype, partials, scalar, 1.0, order)
        note(order=order, dtypes=[dtype.itemsize])


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
