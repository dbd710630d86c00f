"""The runs of a model as fastnn.fuse would find them, with the tensors that arrive at them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node

from . import functional, nodes, rewriting, tracing
from .calls import Call, call_of
from .rewriting import Candidate

BREAK = "torch.compile breaks the graph here, and no run crosses it"
UNTRACED = "torch.compile cannot trace a part of the model, which runs as it is"
_LAYERS = (nn.Linear, nn.Conv1d, nn.BatchNorm1d, nn.Dropout, *(row.module for row in functional.ACTIVATIONS.values()))


def graph_calls(
    model: nn.Module, inputs: tuple[Any, ...], names: dict[int, str]
) -> tuple[dict[Call, None], set[int], list[str]]:
    """Each distinct call of a run or of a Linear or BatchNorm alone, the ids of the modules in them, and notes.

    names: of the modules by their ids.
    """
    modules = {str(id(module)): module for module in model.modules()}
    found: dict[Call, None] = {}
    reached: set[int] = set()

    def backend(graph: GraphModule, examples: list[Any]) -> Callable[..., Any]:
        candidates = rewriting.rewrite(graph, alone=True)
        met: dict[int, Call] = {}
        for index, candidate in enumerate(candidates):
            owners = [modules.get(_innermost(node), model) for node in candidate.layers]
            reached.update(id(owner) for owner in owners)
            place, layers = _place(owners, names), _kinds(candidate, owners)
            met[index] = Call(place, layers, candidate.reason)
            if candidate.fused is not None:
                _record(candidate.fused, partial(met.__setitem__, index), place, layers)
        graph.recompile()

        def run(*arguments: Any) -> Any:
            result = graph.forward(*arguments)
            found.update(dict.fromkeys(met.values()))
            return result

        return run

    failures: list[Exception] = []
    before = dict(counters["graph_break"])
    tracing.compiled_call(model, backend, failures.append)(*inputs)
    breaks = [reason for reason, count in counters["graph_break"].items() if count > before.get(reason, 0)]
    notes = [f"{BREAK}: {_first_line(reason)}" for reason in breaks]
    notes += [f"{UNTRACED}: {_first_line(error)}" for error in failures]
    return found, reached, list(dict.fromkeys(notes))


def _first_line(reason: Any) -> str:
    reason = getattr(reason, "inner_exception", reason)
    return next(iter(str(reason).strip().splitlines()), type(reason).__name__)


def _innermost(node: Node) -> str:
    """The id of the module whose forward the node is of, empty for the root's own; "id@1" is of its second call."""
    return next(reversed(node.meta.get("nn_module_stack") or {"": None})).partition("@")[0]


def _kinds(candidate: Candidate, owners: list[nn.Module]) -> tuple[str, ...]:
    """The layer's type, or the function's name where a forward calls one itself."""
    return tuple(
        type(owner).__name__ if isinstance(owner, _LAYERS) else nodes.name(node)
        for node, owner in zip(candidate.layers, owners, strict=True)
    )


def _place(owners: list[nn.Module], names: dict[int, str]) -> str:
    """Names of the modules in the model, one after another as "net.0-3"."""
    given = list(dict.fromkeys(names[id(owner)] for owner in owners if isinstance(owner, _LAYERS)))
    if not any(given):
        return names[id(owners[0])] or "model"
    parents, children = zip(*(name.rpartition(".")[::2] for name in given), strict=True)
    if len(given) > 1 and len(set(parents)) == 1 and all(map(str.isdigit, children)):
        return f"{given[0]}-{children[-1]}"
    return ", ".join(given)


def _record(node: Node, take: Callable[[Call], Any], place: str, layers: tuple[str, ...]) -> None:
    """Lets the call of a fused block say with what it is called."""
    block: Any = node.target

    def recorded(input: Tensor, weight: Tensor | None, *others: Any, **layout: Any) -> Tensor:
        bias, gamma, beta, mean, var, counter, training, momentum, eps, activation, _, _, p = others
        norm = functional.BatchNorm(mean, var, gamma, beta, counter, training, momentum, eps)
        rows = rewriting.rows_of(input, layout["enters"]) if layout else input
        matrix = weight.flatten(1) if weight is not None else None
        take(call_of(place, layers, rows, matrix, bias, None if training is None else norm, activation, p))
        return block(input, weight, *others, **layout)

    node.target = recorded
