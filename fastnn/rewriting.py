"""Finds the runs in Dynamo's graph of a model and puts one call of the fused block in the place of each.

A run's nodes follow one another, each the only use of the one before; views that keep its rows may stand between them.
Nothing between its first and its last node may write what it reads, or read or write what it writes, as all of it
happens where its last node was. What the graph returns keeps the strides of its fake tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from . import functional, nodes
from .nodes import Layer
from .runs import ACTIVATION, BATCH_NORM, LINEAR

ROWS, LAST, FIRST = "(M, N)", "(*, N)", "(B, N, L)"  # layouts of a value with N features
ALONE = "nothing beside it to fuse with"
SEVERAL_USES = "its result is used more than once"
DISTURBED = "what it reads or writes is used between it and what follows"
OVER_DIMENSION_1 = "BatchNorm1d over dimension 1 of a 3-D input, which is not that of the features"
TRANSPOSED = "BatchNorm1d of a (B, N, L) input, whose two transpositions would cost more than they save"
_DEFAULTS = {
    "weight": None, "bias": None, "gamma": None, "beta": None, "running_mean": None, "running_var": None,
    "num_batches_tracked": None, "norm_training": None, "momentum": 0.1, "eps": 1e-5, "activation": "identity",
    "a": 0.0, "b": 0.0, "p": 0.0,
}  # fmt: skip


@dataclass
class Candidate:
    """A run, or a layer alone: its nodes in order. `fused` stands in the graph for them, or `reason` says why not."""

    layers: list[Node]
    reason: str = ""
    fused: Node | None = None


@dataclass
class _Run:
    """What is found of a run. layouts: of what its members give; begins: whether a run can begin with its first."""

    members: list[Node]
    layouts: list[str]
    enters: str
    places: dict[int, Layer]
    layers: list[Node]
    counter: Node | None = None
    stop: str = ""
    begins: bool = True

    @property
    def input(self) -> Node:
        return self.members[0].args[0]  # type: ignore[return-value]


def rewrite(module: GraphModule, alone: bool, within: bool = False) -> list[Candidate]:
    """Rewrites the graph and those within it, as of a checkpoint; every run, and every Linear and BatchNorm that is in
    none, with the reason.

    alone: whether a Linear alone is a run. within: whether it is a graph within another.
    """
    found = [candidate for inner in _checkpointed(module) for candidate in rewrite(inner, alone, True)]
    strides, taken = _result_strides(module), set()
    for node in list(module.graph.nodes):
        layer = None if node in taken else nodes.layer_of(node)
        if layer is None:
            continue
        run = _run_from(node, layer)
        taken |= set(run.members)
        if len(run.layers) > 1 or (alone and layer.place == LINEAR and run.begins and not layer.is_conv):
            found.append(Candidate(run.layers, fused=_emit(module.graph, run)))
        elif layer.place in (LINEAR, BATCH_NORM):
            found.append(Candidate(run.layers, run.stop))
    if any(candidate.fused is not None for candidate in found):
        _keep_strides(module, None if within else strides)
        module.graph.lint()
        module.recompile()
    return found


def _checkpointed(module: GraphModule) -> list[GraphModule]:
    """The graphs that the graph checkpoints; others within it, as of control flow, are left as they are."""
    uses = [(node, user) for node in module.graph.nodes if node.op == "get_attr" for user in node.users]
    bodies = dict.fromkeys(getattr(module, node.target) for node, user in uses if "checkpoint" in str(user.target))
    return [body for body in bodies if isinstance(body, GraphModule)]


def _run_from(node: Node, layer: Layer) -> _Run:
    """The longest run that begins with the node; of that node alone where it can begin none."""
    layout = FIRST if layer.is_conv else ROWS if len(nodes.shape(node) or ()) == 2 else LAST
    if layer.place == BATCH_NORM and layout == LAST:
        layout = FIRST
    run = _Run([node], [layout], layout, {layer.place: layer}, [node])
    run.stop = layer.reason or _unfit_input(node, layer, layout)
    run.begins = not run.stop
    if layer.place == BATCH_NORM:
        run.counter = nodes.counter_of(node)
    while not run.stop:
        run.stop = _extend(run)
    _leave_out_last_views(run)
    return run


def _unfit_input(node: Node, layer: Layer, layout: str) -> str:
    input = nodes.value(node.args[0])
    if not isinstance(input, Tensor) or input.layout is not torch.strided or input.is_nested or input.dim() < 2:
        return "its input is no strided tensor of two dimensions or more"
    if layer.in_place:
        return "in place, it changes the input of the run that it begins"
    if layer.place >= ACTIVATION and not input.is_contiguous():
        return "its input is not contiguous"
    if layer.place == BATCH_NORM and layout == FIRST and not input.transpose(1, 2).is_contiguous():
        return TRANSPOSED
    return ""


def _extend(run: _Run) -> str:
    """Takes the next node into the run, or says why not."""
    last, layout = run.members[-1], run.layouts[-1]
    if len(last.users) != 1:
        return SEVERAL_USES if last.users else "nothing uses its result"
    (node,) = last.users
    if not node.args or node.args[0] is not last or node.all_input_nodes.count(last) > 1:
        return ALONE
    layer, counter = nodes.layer_of(node), None
    if layer is None:
        if nodes.is_swap(node) and layout != ROWS:
            layout = LAST if layout == FIRST else FIRST
        elif nodes.is_view_of_rows(node) and layout != FIRST and _has_rows_of_input(run, node):
            layout = ROWS if len(nodes.shape(node) or ()) == 2 else LAST
        else:
            return ALONE
    elif layer.place <= max(run.places) or layer.reason:
        return ALONE
    elif layer.place == BATCH_NORM:
        if layout == LAST:
            return OVER_DIMENSION_1
        counter = nodes.counter_of(node)
    if not _is_undisturbed(run, node, counter):
        return DISTURBED
    run.members.append(node)
    run.layouts.append(layout)
    if layer is not None:
        run.layers.append(node)
        run.places[layer.place] = layer
        run.counter = counter or run.counter
    return ""


def _has_rows_of_input(run: _Run, view: Node) -> bool:
    """Whether the view has two dimensions, or as many rows along each as what entered the run."""
    entered, sizes = nodes.shape(run.input) or (), nodes.shape(view) or ()
    leading = entered[::2] if run.enters == FIRST else entered[:-1]
    return len(sizes) == 2 or list(map(str, sizes[:-1])) == list(map(str, leading))


def _is_undisturbed(run: _Run, last: Node, counter: Node | None) -> bool:
    """Whether what the run's nodes do may all happen here, after whatever stands between them."""
    own = {*run.members, last, *(node for node in (counter, run.counter) if node is not None)}
    reads: set[int] = set()
    writes: set[int] = set()
    node = run.counter if run.counter is not None and run.counter.next is run.members[0] else run.members[0]
    while node is not last:
        written = nodes.written(node)
        if node in own:
            reads |= nodes.memory({*node.all_input_nodes} - own)
            writes |= nodes.memory(written or ())
        elif written is None or nodes.memory(written) & reads or writes & nodes.memory(node.all_input_nodes):
            return False
        node = node.next
    return True


def _leave_out_last_views(run: _Run) -> None:
    """But for a transposition that the fused block undoes without a copy."""
    end = run.members.index(run.layers[-1]) + 1
    if run.layouts[end - 1] == FIRST and end < len(run.members):
        end += 1
    del run.members[end:], run.layouts[end:]


def _emit(graph: Graph, run: _Run) -> Node:
    last, leaves = run.members[-1], run.layouts[-1]
    counter = [] if run.counter is None else [run.counter]
    given: dict[str, Any] = dict(_DEFAULTS)
    for layer in run.places.values():
        given |= layer.arguments
    for node in counter:
        given["num_batches_tracked"] = node.args[0]
    arguments = (run.input, *given.values())
    with graph.inserting_before(last):
        if run.enters == leaves and (leaves == ROWS or (leaves == LAST and BATCH_NORM not in run.places)):
            fused = graph.call_function(functional.block, arguments)
        else:
            fused = graph.call_function(block_of_rows, arguments, {"enters": run.enters, "leaves": leaves})
    written: set[Node] = set().union(*(nodes.written(node) or () for node in (*run.members, *counter)))
    fused.meta = {**last.meta, nodes.WRITTEN: written}
    last.replace_all_uses_with(fused)
    for node in (*reversed(run.members), *counter):
        graph.erase_node(node)
    return fused


def rows_of(input: Tensor, enters: str) -> Tensor:
    """(M, K) of an input in that layout."""
    return (input.transpose(1, 2) if enters == FIRST else input).flatten(0, -2)


def block_of_rows(
    input: Tensor, weight: Tensor | None, *others: Any, enters: str, leaves: str, copies: bool = False
) -> Tensor:
    """functional.block on the rows of an input in one layout, in another.

    copies: whether the result has the strides of the other layout, as torch's layers give them.
    """
    weight = weight.squeeze(-1) if weight is not None and weight.dim() == 3 else weight
    out = functional.block(rows_of(input, enters), weight, *others)
    if leaves == ROWS:
        return out
    out = out.unflatten(0, input.shape[::2] if enters == FIRST else input.shape[:-1])
    if copies or leaves == FIRST:
        out = out.transpose(1, 2)
    if copies:
        out = out.contiguous()
    return out.transpose(1, 2) if copies and leaves == LAST else out


def _keep_strides(module: GraphModule, wanted: list[str] | None) -> None:
    """Lets runs copy where what the graph gives would have other strides, or where a view of them would not exist.

    wanted: strides of what the graph gives; None where they cannot be looked at.
    """
    doubtful = []
    for node in module.graph.nodes:
        if node.target is block_of_rows and node.kwargs["leaves"] != ROWS:
            if nodes.value(node).is_contiguous() != (node.kwargs["leaves"] == LAST):
                doubtful.append(node)
    if not doubtful:
        return
    others = [node for node in module.graph.nodes if node.op.startswith("call") and node not in doubtful]
    # With other strides a reshape may be a copy, where it was a view that someone writes to.
    differ = any(nodes.written(node) is None or nodes.name(node) == "as_strided" for node in others)
    if wanted is not None and not differ and _has_strides(module, wanted):
        return
    for node in doubtful:
        user = next(iter(node.users))
        chained = len(node.users) == 1 and user.target is block_of_rows
        if not (chained and node.kwargs["leaves"] == user.kwargs["enters"]):
            node.kwargs = {**node.kwargs, "copies": True}


def _result_strides(module: GraphModule) -> list[str]:
    (output,) = [node for node in module.graph.nodes if node.op == "output"]
    return _strides(nodes.value(node) for node in tree_leaves(output.args))


def _strides(values: Iterable[Any]) -> list[str]:
    """As words, since comparing symbols would guard on their values."""
    return [str(value.stride()) for value in values if isinstance(value, Tensor)]


def _has_strides(module: GraphModule, wanted: list[str]) -> bool:
    """Whether the graph runs on the fake tensors of its inputs, and gives these strides."""
    inputs = [nodes.value(node) for node in module.graph.nodes if node.op == "placeholder"]
    try:
        with next(value.fake_mode for value in inputs if isinstance(value, FakeTensor)):
            return _strides(tree_leaves(Interpreter(module).run(*inputs))) == wanted
    except Exception:  # whatever a view, or a graph within this one, raises
        return False
