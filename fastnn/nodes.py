"""What a node of a graph of torch's functions is: a layer of a run, a view of its rows, or what may stand beside it.

The graph is Dynamo's, before any decomposition; each node's value, a fake tensor, is in its meta.
"""

import inspect
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from .runs import ACTIVATION, BATCH_NORM, DROPOUT, LINEAR

WRITTEN = "fastnn_written"  # in the meta of a fused run: what its layers wrote to
_LINEAR, _CONV, _BATCH_NORM, _DROPOUT = F.linear, torch.conv1d, F.batch_norm, F.dropout
# Names of arguments beside the input, in their order: builtins have no signature to ask.
_PARAMETERS: dict[Any, tuple[str, ...]] = {
    _LINEAR: ("weight", "bias"),
    _CONV: ("weight", "bias", "stride", "padding", "dilation", "groups"),
    _BATCH_NORM: ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    _DROPOUT: ("p", "training", "inplace"),
}
# Row of the table of activations, and its parameters with torch's defaults. Strings are methods of a tensor.
_ACTIVATIONS: dict[Any, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), ("relu", {"inplace": False})),
    **dict.fromkeys((torch.tanh, torch.tanh_, F.tanh, "tanh", "tanh_"), ("tanh", {})),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, F.sigmoid, "sigmoid", "sigmoid_"), ("sigmoid", {})),
    F.leaky_relu: ("leaky_relu", {"negative_slope": 0.01, "inplace": False}),
    F.leaky_relu_: ("leaky_relu", {"negative_slope": 0.01}),
    F.elu: ("elu", {"alpha": 1.0, "inplace": False}),
    F.elu_: ("elu", {"alpha": 1.0}),  # and two scales, which are no ELU's
    F.silu: ("silu", {"inplace": False}),
    F.gelu: ("gelu", {"approximate": "none"}),
    F.softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
}
_VIEWS = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous")
_SWAPS = ("transpose", "swapaxes", "swapdims", "permute")


class Layer(NamedTuple):
    """arguments: those of fastnn.functional.block that it sets; reason: why it can be in no run, else empty."""

    place: int
    arguments: dict[str, Any]
    reason: str = ""
    in_place: bool = False
    is_conv: bool = False


def value(node: Any) -> Any:
    """The fake tensor or symbol that stands for what the node gives."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def shape(node: Any) -> tuple[Any, ...] | None:
    found = value(node)
    return tuple(found.shape) if isinstance(found, Tensor) else None


def layer_of(node: Node) -> Layer | None:
    """None where it is no layer of the grammar."""
    target = node.target
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return None
    if target in _ACTIVATIONS:
        return _activation(node)
    if target is _LINEAR:
        return _linear(**_arguments(node))
    if target is _CONV:
        return _conv(node.args[0], **_arguments(node))
    if target is _BATCH_NORM:
        return _batch_norm(node.args[0], **_arguments(node))
    if target is _DROPOUT:
        return _dropout(**_arguments(node))
    return None


def _arguments(node: Node) -> dict[str, Any]:
    return dict(zip(_PARAMETERS[node.target], node.args[1:], strict=False)) | dict(node.kwargs)


def _linear(weight: Any, bias: Any = None) -> Layer:
    arguments = {"weight": weight, "bias": bias}
    rows = shape(weight)
    if rows is None or len(rows) != 2:
        return Layer(LINEAR, arguments, "its weight is not 2-D")
    if bias is not None and shape(bias) != rows[:1]:
        return Layer(LINEAR, arguments, "its bias is not of shape (N,)")
    return Layer(LINEAR, arguments)


def _conv(
    input: Node,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Layer | None:
    """A convolution over single positions, which is a Linear over channels."""
    sizes = shape(weight)
    pads = padding not in (0, (0,), [0], "valid", "same")
    if sizes is None or sizes[-1] != 1 or groups != 1 or pads or stride not in (1, (1,), [1]):
        return None
    unbatched = len(shape(input) or ()) != 3
    return Layer(LINEAR, {"weight": weight, "bias": bias}, "its input is not batched" * unbatched, is_conv=True)


def _batch_norm(
    input: Node,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Layer | None:
    if len(shape(input) or ()) not in (2, 3):
        return None
    tensors = {"gamma": weight, "beta": bias, "running_mean": running_mean, "running_var": running_var}
    arguments = tensors | {"norm_training": training, "momentum": momentum, "eps": eps}
    values = [value(tensor) for tensor in tensors.values() if tensor is not None]
    dtypes = {tensor.dtype for tensor in values}
    reason = ""
    if not _are_numbers(training, momentum, eps):
        reason = "its settings are computed"
    elif training and eps <= 0:
        reason = "its eps is not positive"
    elif len(dtypes) > 1 or not dtypes <= {value(input).dtype, torch.float32}:
        reason = "its tensors are of several dtypes, or of another than the input"
    elif any(tensor.dim() != 1 for tensor in values):
        reason = "its tensors are not of shape (N,)"
    elif any(value(tensor).requires_grad for tensor in (running_mean, running_var) if tensor is not None):
        reason = "its running statistics require a gradient"
    elif running_mean is running_var is None and not training:
        reason = "it has no running statistics to take"
    elif running_mean is running_var is not None or (running_mean is None) != (running_var is None):
        reason = "it has one running statistic alone"
    return Layer(BATCH_NORM, arguments, reason)


def _activation(node: Node) -> Layer:
    name, defaults = _ACTIVATIONS[node.target]
    others = len(node.args) > 1 + len(defaults) or not node.kwargs.keys() <= defaults.keys()
    given = defaults | dict(zip(defaults, node.args[1:], strict=False)) | dict(node.kwargs)
    in_place = bool(given.pop("inplace", False)) or str(getattr(node.target, "__name__", node.target)).endswith("_")
    if given.pop("approximate", "none") == "tanh":
        name = "gelu_tanh"
    numbers = [*given.values(), 0.0, 0.0][:2]
    reason = "" if _are_numbers(*numbers) and not others else "its parameters are computed, or others than the layer's"
    return Layer(ACTIVATION, {"activation": name, "a": numbers[0], "b": numbers[1]}, reason, in_place)


def _dropout(p: Any = 0.5, training: Any = True, inplace: Any = False) -> Layer:
    fits = _are_numbers(p, training) and 0 <= p <= 1
    arguments = {"p": float(p) if training else 0.0} if fits else {"p": p}
    return Layer(DROPOUT, arguments, "" if fits else "its p is computed, or outside [0, 1]", bool(inplace))


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, (bool, int, float)) for value in values)


def name(node: Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def is_swap(node: Node) -> bool:
    """Whether it exchanges the last two dimensions of three."""
    if node.op not in ("call_method", "call_function") or name(node) not in _SWAPS or len(shape(node) or ()) != 3:
        return False
    dims: Any = node.args[1:]
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    if not all(isinstance(dim, int) for dim in dims) or node.kwargs:
        return False
    found = [dim % 3 for dim in dims]
    return found == [0, 2, 1] if name(node) == "permute" else sorted(found) == [1, 2]


def is_view_of_rows(node: Node) -> bool:
    """Whether it gives the same rows, of as many features, in the same order."""
    if node.op not in ("call_method", "call_function") or name(node) not in _VIEWS or not node.args:
        return False
    if any(isinstance(given, torch.dtype) for given in (*node.args, *node.kwargs.values())):
        return False  # which has no gradient
    before, after = value(node.args[0]), value(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    features = before.shape[-1:], after.shape[-1:]
    return all(isinstance(sizes[0], int) for sizes in features if sizes) and features[0] == features[1]


def counter_of(norm: Node) -> Node | None:
    """The node that counts the batch for a BatchNorm, as torch.nn.BatchNorm1d does just before it normalises."""
    node = norm.prev
    modules, others = (list(of.meta.get("nn_module_stack") or ()) for of in (norm, node))
    same = bool(modules) and modules == others
    return node if same and _counts(node) and node.args[1] == 1 and not node.users else None


def _counts(node: Node) -> bool:
    """Whether it adds to an integer in place."""
    if node.op != "call_method" or node.target != "add_" or len(node.args) != 2:
        return False
    counter = value(node.args[0])
    return isinstance(counter, Tensor) and counter.dtype == torch.int64 and counter.dim() == 0


def written(node: Node) -> set[Node] | None:
    """The nodes whose tensors it writes to; None where it may change anything, as a grad mode."""
    if WRITTEN in node.meta or node.op in ("placeholder", "get_attr"):
        return node.meta.get(WRITTEN, set())
    if node.target is _BATCH_NORM:
        found = _arguments(node)
        buffers = found.get("running_mean"), found.get("running_var")
        return {buffer for buffer in buffers if isinstance(buffer, Node)} if found.get("training") else set()
    if _counts(node):
        return {node.args[0]}  # type: ignore[arg-type]
    layer = layer_of(node)
    if layer is not None and layer.in_place:
        return set() if _is_own(node.args[0]) else None
    return set() if _is_pure(node) else None


def memory(found: Iterable[Node]) -> set[int]:
    """Which storages the nodes' tensors are in."""
    values = [leaf for node in found for leaf in tree_leaves(value(node)) if isinstance(leaf, Tensor)]
    return {leaf.untyped_storage()._cdata for leaf in values if leaf.layout is torch.strided}


def _is_own(node: Any) -> bool:
    """Whether it is a new tensor of which there is one use; where it drops nothing, dropout gives its input back."""
    layer = layer_of(node)
    if layer is None or len(node.users) > 1:
        return False
    return not (layer.in_place or layer.place == DROPOUT) or _is_own(node.args[0])


def _is_pure(node: Node) -> bool:
    if value(node) is None or node.op not in ("call_function", "call_method") or node.kwargs.get("out") is not None:
        return False
    own, target = name(node), node.target
    if own.endswith("_") and not own.endswith("__"):
        return False
    if node.op == "call_method":
        return not own.startswith(("__i", "__set"))
    if isinstance(target, torch._ops.HigherOrderOperator) or own.endswith(("batch_norm", "instance_norm")):
        return False  # norms write their running statistics
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet: Any = getattr(target, "overloadpacket", target)
        overloads = [getattr(packet, name) for name in packet.overloads()]
        return not any(overload._schema.is_mutable for overload in overloads)
    if getattr(target, "__module__", "") == "_operator":
        in_place = own[0] == "i" and hasattr(operator, f"__{own}__") and own not in ("index", "inv", "invert")
        return own != "setitem" and not in_place
    if getattr(target, "__module__", "") == F.__name__:
        given = inspect.signature(target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
        return not given.get("inplace") and given.get("max_norm") is None  # to which an embedding's weight is scaled
    return getattr(target, "__module__", "") in ("torch", None) or isinstance(target, type(torch.relu))
