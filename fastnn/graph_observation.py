"""The runs of a model as fastnn.fuse would find them, with the tensors that arrive at them."""

from collections.abc import Callable
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


class _Names:
    """Which modules of the model a graph's nodes are of, and their names."""

    def __init__(self, model: nn.Module, names: dict[int, str]) -> None:
        self.modules = {name: model.get_submodule(name) for name in names.values()}
        self._of_ids = {str(id(module)): name for name, module in self.modules.items()}
        self._of_tensors = {
            id(tensor): name
            for name, module in self.modules.items()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }

    def of_node(self, node: Node) -> str:
        """Of the innermost module whose forward the node is of; in its stack "id@1" is a second call."""
        innermost = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
        return self._of_ids.get(innermost.partition("@")[0], "")

    def moved(self, names: list[str], tensors: dict[str, Tensor]) -> list[str]:
        """The same for another module of the same code, whose tensors the graph is given in the place of theirs."""
        for name in names:
            other = self._of_tensors.get(id(tensors.get(name)), name)
            if other != name:
                old, new = name.split("."), other.split(".")
                while old and new and old[-1] == new[-1]:
                    del old[-1], new[-1]
                there, here = ".".join(old), ".".join(new)
                found = [here + name.removeprefix(there) if name.startswith(there) else name for name in names]
                return found if all(name in self.modules for name in found) else names
        return names


def graph_calls(
    model: nn.Module, inputs: tuple[Any, ...], names: dict[int, str]
) -> tuple[dict[Call, None], set[int], list[str]]:
    """Each distinct call of a run or of a Linear or BatchNorm alone, the ids of the modules in them, and notes.

    names: of the modules by their ids.
    """
    of, found, reached = _Names(model, names), dict[Call, None](), set[int]()

    def backend(graph: GraphModule, examples: list[Any]) -> Callable[..., Any]:
        parts = [_Part(candidate, graph, of) for candidate in rewriting.rewrite(graph, alone=True)]
        graph.recompile()

        def run(*arguments: Any) -> Any:
            for part in parts:
                part.begin(arguments, of)
            result = graph.forward(*arguments)
            found.update((part.call, None) for part in parts)
            reached.update(id(of.modules[name]) for part in parts for name in part.names)
            return result

        return run

    failures: list[Exception] = []
    before = dict(counters["graph_break"])
    try:
        with tracing.forgotten():
            tracing.compiled_call(model, backend, failures.append)(*inputs)
    finally:
        of.modules.clear()  # Dynamo keeps what it compiled, and with it the backend, where a frame's globals are
    breaks = [reason for reason, count in counters["graph_break"].items() if count > before.get(reason, 0)]
    notes = [f"{BREAK}: {_first_line(reason)}" for reason in breaks]
    notes += [f"{UNTRACED}: {_first_line(error)}" for error in failures]
    return found, reached, list(dict.fromkeys(notes))


class _Part:
    """A candidate in a graph: the call of it that was seen last."""

    def __init__(self, candidate: Candidate, graph: GraphModule, of: _Names) -> None:
        self._traced = [of.of_node(node) for node in candidate.layers]
        self._targets = [nodes.name(node) for node in candidate.layers]
        self._reason = candidate.reason
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._tensors: dict[str, int] = {}  # where the graph is given one of a layer's, by the layer's name
        for user in [candidate.fused] if candidate.fused is not None else candidate.layers:
            for node in user.all_input_nodes:
                if node in places and node is not user.args[0]:
                    self._tensors.setdefault(of.of_node(node), places.index(node))
        if candidate.fused is not None:
            self._record(candidate.fused)

    def begin(self, arguments: tuple[Any, ...], of: _Names) -> None:
        tensors = {name: arguments[place] for name, place in self._tensors.items()}
        self.names = of.moved(self._traced, tensors)
        owners = [of.modules[name] for name in self.names]
        layers = tuple(
            type(owner).__name__ if isinstance(owner, _LAYERS) else target
            for owner, target in zip(owners, self._targets, strict=True)
        )
        called = [name for name, owner in zip(self.names, owners, strict=True) if isinstance(owner, _LAYERS)]
        self.call = Call(_joined(called) or self.names[0] or "model", layers, self._reason)

    def _record(self, node: Node) -> None:
        """Lets the fused block say with what it is called."""
        block: Any = node.target

        def recorded(input: Tensor, weight: Tensor | None, *others: Any, **layout: Any) -> Tensor:
            bias, gamma, beta, mean, var, counter, training, momentum, eps, activation, _, _, p = others
            norm = functional.BatchNorm(mean, var, gamma, beta, counter, training, momentum, eps)
            rows = rewriting.rows_of(input, layout["enters"]) if layout else input
            matrix = weight.flatten(1) if weight is not None else None
            place, layers, batch_norm = self.call.modules, self.call.layers, None if training is None else norm
            self.call = call_of(place, layers, rows, matrix, bias, batch_norm, activation, p)
            return block(input, weight, *others, **layout)

        node.target = recorded


def _joined(names: list[str]) -> str:
    """One after another, numbers within one container as "net.0-3"."""
    given = list(dict.fromkeys(names))
    parents, children = zip(*(name.rpartition(".")[::2] for name in given), strict=True) if given else ((), ())
    if len(given) > 1 and len(set(parents)) == 1 and all(map(str.isdigit, children)):
        return f"{given[0]}-{children[-1]}"
    return ", ".join(given)


def _first_line(reason: Any) -> str:
    reason = getattr(reason, "inner_exception", reason)
    return next(iter(str(reason).strip().splitlines()), type(reason).__name__)
