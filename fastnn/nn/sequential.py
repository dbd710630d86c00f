"""Sequential: torch.nn.Sequential whose forward runs each fusible run of its layers as one op."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import runs

observer: Callable[["Sequential", Any, Any], None] | None = None  # told of each part of a forward and its input


class Sequential(nn.Sequential):
    """A ``torch.nn.Sequential`` that computes each run of its children as one fused op.

    A run is ``[Linear] [BatchNorm1d] [activation] [Dropout]``, any two or more in this order, or a small Linear by
    itself, whose gradients are then one launch; activations are ReLU, LeakyReLU, GELU, SiLU, Tanh, Sigmoid, ELU,
    Softplus and Identity. The children are the real torch modules, so that keys, initialisation, hooks, ``.to``,
    ``deepcopy`` and pickle are torch's; only ``forward`` differs. Values, gradients and buffers equal those of
    ``torch.nn.Sequential``; on a GPU the dropout mask is another draw of the same distribution.

    A child that is a subclass, has a hook or a patched ``forward`` is called by itself, and what is around it
    stays fused. Under a global module hook, a patched layer class, ``torch.jit``, ``torch.fx`` or ``torch.export``
    every child is.

    Shapes: input (*, K), or (M, K) for a run with BatchNorm1d; output (*, N).

    Raises:
        RuntimeError, ValueError: what the children raise for a wrong shape, dtype or batch, before any buffer changes.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or runs.are_followed():
            return super().forward(input)
        for part in runs.split(self):
            if observer is not None:
                observer(self, part, input)
            if not isinstance(part, tuple):
                input = part(input)
            elif runs.fits(part, input):
                input = runs.apply(part, input)
            else:
                for layer in part:
                    input = layer(input)
        return input

    def __getitem__(self, idx: Any) -> nn.Module:
        """A slice is a plain fused Sequential, whatever constructor the subclass has."""
        if isinstance(idx, slice):
            return Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def __add__(self, other: Any) -> "Sequential":
        return Sequential(*super().__add__(other))

    def __mul__(self, other: int) -> "Sequential":
        return Sequential(*super().__mul__(other))

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in its place: it knows neither our ops nor Python's introspection."""
        return nn.Sequential(OrderedDict(self._modules))
