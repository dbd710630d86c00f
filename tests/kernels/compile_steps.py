"""Compiles the optimizers' launches for a GPU, without one, and prints a JSON row per launch. Run by test_steps.py.

python -m tests.kernels.compile_steps CAPABILITY
"""

import json
import sys
from itertools import chain

import torch
from support.ahead_of_time import MULTIPROCESSORS, resources, stand_in_driver

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


def main(capability: int) -> None:
    tables = Tables({}, [5000, 7], [0, 0], torch.device("cpu"), MULTIPROCESSORS[capability])
    tables.set_groups([0.0] * 9, [0] * 9)
    scalar, partials = torch.zeros(()), torch.zeros(gradient_norm.partials_of(tables))
    rows = []
    with stand_in_driver(capability) as launches:

        def note(**row) -> None:
            for launch in launches:
                rows.append({"kernel": launch.kernel, **row, **vars(resources(launch.compiled))})
            launches.clear()

        for (rule, present, counts), dtypes in [(rule, dtypes) for dtypes in DTYPES for rule in RULES]:
            step = Step(rule, *dtypes, present, counts, False)
            Launcher(step, tables)()
            note(rule=rule, present=present, dtypes=[dtype.itemsize for dtype in dtypes])
        for rule, present, dtypes in (("adam", 7, DTYPES[0]), ("nadam", 3, DTYPES[2])):
            launcher = Launcher(Step(rule, *dtypes, present, True, dtypes[0] == BF16), tables)
            launcher(1.0, partials, scalar, scalar, scalar)  # clipped, scaled, rounded at random
            note(rule=rule, present=present, dtypes=[dtype.itemsize for dtype in dtypes], everything=True)
        for dtype, order in chain(((dtype, 2) for dtype in (F32, BF16, F16)), ((F32, 1), (F32, 0))):
            gradient_norm.add_up(tables, dtype, partials, order)
            note(order=order, dtypes=[dtype.itemsize])
            gradient_norm.clip(tables, dtype, partials, scalar, 1.0, order)
            note(order=order, dtypes=[dtype.itemsize])
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
