"""fastnn.explain: which runs of a model are fused, by which plans, and why."""

import html
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import costs, dispatch, plans
from .calls import Call
from .observation import observe
from .plans import Choice

NO_RUNS = "There is no run of layers in this model."
INTERPRETED = "The kernels run in Triton's interpreter (TRITON_INTERPRET=1), by the plans of an H100."


class Row(NamedTuple):
    """A run of layers; forward and backward name plans, and are empty where there is none.

    why holds a sentence for each choice; microseconds {"forward", "sums" or "gradients": {plan: microseconds}}, by the
    clock where fastnn.tune measured them, else by the cost model. accesses: of [M, N] in device memory in a training
    step, or in a forward where no gradient is asked for; None where the run is not fused.
    """

    modules: str
    layers: str
    fused: bool
    reason: str
    path: str
    forward: str
    backward: str
    accesses: int | None
    why: tuple[str, ...]
    microseconds: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Explanation:
    """A model's runs as rows; str() is a table, and a notebook shows one. notes: what holds for all of them."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    HEADER = ("modules", "layers", "fused", "path", "forward", "backward", "accesses")

    def __str__(self) -> str:
        lines = [self.HEADER, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        found = []
        for cells, row in zip(lines, (None, *self.rows), strict=True):
            found.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
            found += [f"    {sentence}" for sentence in _sentences(row)]
        return "\n".join([*(found if self.rows else [NO_RUNS]), *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(tag: str, cells: tuple[str, ...]) -> str:
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

        body = [
            line("td", (*map(html.escape, _cells(row)), "<br>".join(map(html.escape, _sentences(row)))))
            for row in self.rows
        ]
        table = "<table>" + line("th", (*self.HEADER, "why")) + "".join(body) + "</table>"
        notes = [f"<p>{html.escape(note)}</p>" for note in self.notes]
        return "".join([table if self.rows else f"<p>{NO_RUNS}</p>", *notes])


def explain(model: Any, *inputs: Any) -> Explanation:
    """Which runs of the model are fused, by which plans of kernels, and why; which layers are in no run, and why.

    Runs of its ``fastnn.nn.Sequential`` modules are as they are, others as ``fastnn.fuse`` finds them, whether the
    model is fused already or not. For each of both it calls the model once, on copies of the inputs and of its buffers.
    Buffers and the state of torch's generators are as before, and so is all that a forward by itself does not change;
    hooks are called. Whether gradients and autocast are on counts as in a call: within ``torch.no_grad()`` or in
    ``eval()`` it explains that. With SyncBatchNorm over several processes, all of them must call it.

    Args:
        model: any torch.nn.Module.
        inputs: what it is called with.

    Returns:
        An Explanation: ``print`` it, or take its ``rows``.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: model holds lazy modules that have not been called yet.
    """
    calls, notes = observe(model, inputs)
    return explanation_of(calls, tuple(notes))


def explanation_of(calls: list[Call], notes: tuple[str, ...] = ()) -> Explanation:
    interpreted = (INTERPRETED,) if any(call.path.name == "interpreter" for call in calls) else ()
    return Explanation(tuple(map(_row, calls)), (*interpreted, *notes))


def _row(call: Call) -> Row:
    chosen = call.choices()
    reason = call.unfused()
    fused = not reason
    forward, backward = _plan_names(call, chosen) if fused else ("", "")
    why = tuple(f"{part}: {_why(choice)}" for part, choice in chosen.items())
    return Row(
        call.modules, " + ".join(call.layers), fused, reason, call.path.name, forward, backward,
        _accesses(call, chosen) if fused else None, why, {part: c.microseconds for part, c in chosen.items()},
    )  # fmt: skip


def _plan_names(call: Call, chosen: dict[str, Choice]) -> tuple[str, str]:
    forward = chosen["forward"].plan if "forward" in chosen else "library" if call.linear_alone else "apply"
    backward = [chosen["sums"].plan] if "sums" in chosen else []
    if "gradients" in chosen:
        backward.append(chosen["gradients"].plan)
    elif call.save and _products(call):
        backward.append("library")
    return forward, " + ".join(backward)


def _products(call: Call) -> int:
    """The gradients that are a launch of the library each."""
    return call.input_gradient * (call.K > 0) + call.weight_gradient + call.bias_gradient


def _why(choice: Choice) -> str:
    times = ", ".join(f"{name} {us:.1f}" for name, us in choice.microseconds.items())
    excluded = "".join(f"; {name}: {reason}" for name, reason in choice.untrusted.items() if name != choice.plan)
    model = "cost model: " if choice.by == plans.FORCED else ""
    return f"{choice.plan}, {choice.by} ({model}{times} µs{excluded})"


def _accesses(call: Call, chosen: dict[str, Choice]) -> int:
    """By the launches of costs.py, which tests hold to what the interpreter counts."""
    machine = dispatch.machine(call.device)
    rows = costs.Problem("statistics", plans.bucket(call.M), call.N, 0, call.dtype.itemsize, "none")
    forward, sums = chosen.get("forward"), chosen.get("sums")
    launches: list[costs.Launch] = []
    if forward is None:
        launches += () if call.linear_alone else costs.forward_passes(rows, machine)["apply"]
    elif call.K and not call.joined:
        launches += costs.candidates(forward.problem, machine)[forward.plan]
    else:
        launches += costs.forward_passes(rows, machine)[forward.plan]
    if sums is not None:
        launches += costs.backward_passes(rows, machine)[sums.plan]
    grouped = "gradients" in chosen and chosen["gradients"].plan == "grouped"
    products = 1 if grouped else _products(call) if call.save else 0
    products += call.K > 0 if call.joined else forward is None and call.linear_alone
    return sum(launch.accesses for launch in launches) + products


def _cells(row: Row) -> tuple[str, ...]:
    accesses = "" if row.accesses is None else str(row.accesses)
    return row.modules, row.layers, "yes" if row.fused else "no", row.path, row.forward, row.backward, accesses


def _sentences(row: Row | None) -> list[str]:
    return [] if row is None else [*([f"not fused: {row.reason}"] if row.reason else []), *row.why]
