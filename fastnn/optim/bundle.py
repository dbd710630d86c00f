"""A bundle: parameters that one launch steps, with the tables, addresses and step counts kept from step to step."""

import operator
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..memory import copy_in_layout, on, same_layout

if dispatch.HAS_KERNELS:
    from ..kernels import gradient_norm, multi_tensor, tables

grad_of, local_of, nbytes_of = (operator.attrgetter(name) for name in ("grad", "_local_tensor", "nbytes"))
nbytes_and_dtype_of = operator.attrgetter("nbytes", "dtype")


class Member(NamedTuple):
    """A parameter, its entry in the optimizer's state and the index of its group.

    hidden: a count () fp32 on the device for rules that need one and whose state in torch has none.
    """

    param: Tensor
    state: dict[str, Any]
    group: int
    hidden: Tensor | None


class Kind(NamedTuple):
    """What the members of a bundle have in common. states: names in the rule's order, None where there is none.

    counters: names of 0-d entries of the state that each step moves; on_device: they are on the parameter's device.
    """

    device: torch.device
    distributed: bool
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtype: torch.dtype
    states: tuple[str | None, ...]
    counters: tuple[str, ...]
    on_device: bool


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or what a DTensor holds on this rank."""
    return getattr(tensor, "_local_tensor", tensor)


def is_gradient(grad: Tensor, param: Tensor) -> bool:
    """Whether the kernel can take it as the gradient of that parameter, in a copy at most."""
    if type(grad) is not Tensor and not (type(grad) is type(param) and grad.placements == param.placements):  # type: ignore[attr-defined]
        return False
    grad, param = local(grad), local(param)
    return (
        type(grad) is Tensor
        and grad.layout is torch.strided
        and (grad.device, grad.shape) == (param.device, param.shape)
    )


class HostCounts:
    """Counts that torch keeps on the host: a row of one vector each, moved on in one go.

    The kernel moves a mirror of them on by itself, so that a step uploads nothing.
    """

    def __init__(self, counts: list[list[Tensor]], device: torch.device) -> None:
        self.host = torch.tensor([list(map(float, row)) for row in counts], dtype=counts[0][0].dtype, device="cpu")
        self.steps = self.host[0]
        self.mirror = torch.empty_like(self.host, dtype=torch.float32, device=device)
        self.reflect()

    def reflect(self) -> None:
        self.mirror.copy_(self.host)
        self.version = self.host._version

    def catch_up(self) -> None:
        """Takes up what someone has written to a count."""
        if self.host._version != self.version:
            self.reflect()

    def move(self, moved: Tensor | None, momentum: Callable[[Tensor], Tensor]) -> None:
        """One step of those moved (None: of all); what multiplies the products follows from the new steps."""
        self.steps.add_(1 if moved is None else moved)
        if len(self.host) > 1:
            factors = momentum(self.steps)
            self.host[1].mul_(factors if moved is None else torch.where(moved, factors, 1.0))
        self.version = self.host._version


class Bundle:
    """Built once, launched every step."""

    def __init__(self, kind: Kind, members: Sequence[Member], rule: str, seed: int | None) -> None:
        self.kind, self.members = kind, members
        self.params = [member.param for member in members]
        here = self._local(self.params)
        # What a gradient must have in common with its parameter, in as few calls as tell: 45 ns each per tensor.
        self.layout_of: Callable[..., Any] = (
            Tensor.is_contiguous if all(p.is_contiguous() for p in here) else Tensor.stride
        )
        self.form_of = nbytes_of if kind.grad_dtype == torch.float32 else nbytes_and_dtype_of
        self.layouts = list(map(self.layout_of, here))
        self.forms = [self.form_of(torch.empty_like(p, dtype=kind.grad_dtype, device="meta")) for p in here]
        names = [name for name in kind.states if name is not None]
        addresses = {tables.PARAM.value: [p.data_ptr() for p in here]}
        for i, name in enumerate(kind.states):
            if name is not None:
                addresses[tables.STATES.value + i] = [local(m.state[name]).data_ptr() for m in members]
        addresses |= self._adopt_counters()
        self.param_addresses = addresses[tables.PARAM.value]
        self.grad_addresses = [0] * len(members)
        self.groups: tuple[list, list] = [], []
        self.rows: Tensor | None = None
        self.moved: Tensor | None = None
        self.getters = [operator.itemgetter(name) for name in (*names, *kind.counters)]
        self.states = [member.state for member in members]
        self.entries = [list(map(getter, self.states)) for getter in self.getters]
        sizes, groups = [p.numel() for p in here], [member.group for member in members]
        multiprocessors = dispatch.machine(kind.device).multiprocessors
        self.tables = tables.Tables(addresses, sizes, groups, kind.device, multiprocessors)
        present = sum(1 << i for i, name in enumerate(kind.states) if name is not None)
        stochastic = seed is not None and kind.param_dtype == torch.bfloat16
        dtypes = kind.param_dtype, kind.grad_dtype, kind.state_dtype
        step = multi_tensor.Step(rule, *dtypes, present, tables.STEP.value in addresses, stochastic)
        self.launch = multi_tensor.Launcher(step, self.tables, seed or 0)
        self.partials = gradient_norm.partials_of(self.tables)

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(map(local_of, tensors)) if self.kind.distributed else tensors

    def _adopt_counters(self) -> dict[int, list[int]]:
        """Addresses of the counts that the kernel reads and moves on: the state's own, hidden ones, or mirrors."""
        self.counts: HostCounts | None = None
        rows = (tables.STEP.value, tables.PRODUCT.value)
        hidden = [member.hidden for member in self.members if member.hidden is not None]
        counts = [[member.state[name] for member in self.members] for name in self.kind.counters]
        if not counts:
            counts = [hidden] if hidden else []
        elif not self.kind.on_device:
            self.counts = HostCounts(counts, self.kind.device)
            for name, views in zip(self.kind.counters, self.counts.host, strict=True):
                for member, view in zip(self.members, views, strict=True):
                    member.state[name] = view
            counts = [list(row) for row in self.counts.mirror]
        return {row: [count.data_ptr() for count in of_row] for row, of_row in zip(rows, counts, strict=False)}

    def holds(self) -> bool:
        """Whether parameters and states are still the tensors, at the addresses, that the tables were made for."""
        here = self._local(self.params)
        return list(map(Tensor.data_ptr, here)) == self.param_addresses and all(
            all(map(operator.is_, map(getter, self.states), entries))
            for getter, entries in zip(self.getters, self.entries, strict=True)
        )

    def gather(self) -> bool:
        """Takes up the gradients of this step; false where the kernel cannot take one of them."""
        grads = list(map(grad_of, self.params))
        try:
            addresses = list(map(Tensor.data_ptr, grads))
            regular = list(map(self.layout_of, grads)) == self.layouts and list(map(self.form_of, grads)) == self.forms
        except (TypeError, RuntimeError):  # one is missing, or has no memory
            regular = False
        if not regular or 0 in addresses or self.kind.distributed:
            taken = self._take_one_by_one(grads)
            if taken is None:
                return False
            grads, addresses = taken
        self.grads = grads  # copies must live until they are read
        if addresses != self.grad_addresses:
            self.tables.set_gradients(addresses)
            self.grad_addresses = addresses
            present = [address != 0 for address in addresses]
            self.moved = None if all(present) else torch.tensor(present, device="cpu")
        return True

    def _take_one_by_one(self, grads: list[Tensor | None]) -> tuple[list[Tensor | None], list[int]] | None:
        """(gradients that lie as their parameters do, in a copy if need be; their addresses); None if one cannot."""
        found: list[Tensor | None] = []
        for grad, param in zip(grads, self.params, strict=True):
            if grad is not None:
                if not is_gradient(grad, param) or local(grad).dtype != self.kind.grad_dtype:
                    return None
                grad = local(grad)
                if not same_layout(grad, local(param)):
                    grad = copy_in_layout(grad, local(param))
            found.append(grad)
        if all(mine is grad and grad is not None for mine, grad in zip(found, grads, strict=True)):
            self.layouts = list(map(self.layout_of, found))  # next time these will do at once
        return found, [0 if grad is None else grad.data_ptr() for grad in found]

    def set_groups(self, numbers: list[list[float]], addresses: list[list[int]]) -> None:
        """Hyperparameters of all groups, whose changes alone are uploaded."""
        if (numbers, addresses) != self.groups:
            self.tables.set_groups([*chain.from_iterable(numbers)], [*chain.from_iterable(addresses)])
            self.groups, self.rows = (numbers, addresses), None

    def add_up(self, partials: Tensor, grad_scale: Tensor | None) -> None:
        gradient_norm.add_up(self.tables, self.kind.grad_dtype, partials, grad_scale=grad_scale)

    def step(self, momentum: Callable[[Tensor, Tensor], Tensor], *clipping_and_scaling: Any) -> None:
        """Launches the step and counts it on the host; momentum (columns of the members' rows, steps) is NAdam's."""
        if self.counts is not None:
            self.counts.catch_up()
        with on(self.kind.device):
            self.launch(*clipping_and_scaling)
        if self.counts is not None:
            self.counts.move(self.moved, lambda steps: momentum(self._columns(), steps))

    def _columns(self) -> Tensor:
        if self.rows is None:
            rows = [self.groups[0][member.group] for member in self.members]
            self.rows = torch.tensor(rows, dtype=torch.float64, device="cpu").T
        return self.rows
