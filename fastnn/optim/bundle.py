"""A bundle: parameters that one launch steps, with the tables, addresses and step counts kept from step to step."""

import operator
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from .. import dispatch
from ..memory import Forms, copy_in_layout, on, same_layout

if dispatch.HAS_KERNELS:
    from ..kernels import gradient_norm, multi_tensor, tables

grad_of, local_of = operator.attrgetter("grad"), operator.attrgetter("_local_tensor")


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


def is_distributed(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there is no DTensor
    return module is not None and type(tensor) is module.DTensor


def is_gradient(grad: Tensor, param: Tensor) -> bool:
    """Whether the kernel can take it as the gradient of that parameter, in a copy at most."""
    if local(grad) is not grad:
        placed = (type(grad), getattr(grad, "placements", None), getattr(grad, "device_mesh", None))
        if placed != (type(param), getattr(param, "placements", None), getattr(param, "device_mesh", None)):
            return False
    elif local(param) is not param:
        return False
    grad, param = local(grad), local(param)
    plain = type(grad) in (Tensor, nn.Parameter) and grad.layout is torch.strided
    return plain and (grad.device, grad.shape) == (param.device, param.shape)


class HostCounts:
    """Counts that torch keeps on the host: a row of one vector each, moved on in one go.

    The kernel moves a mirror of them on by itself, so that a step uploads nothing.
    """

    def __init__(self, counts: list[list[Tensor]], device: torch.device) -> None:
        wide = any(count.dtype == torch.float64 for count in chain.from_iterable(counts))
        dtype = torch.float64 if wide else torch.float32
        self.host = torch.tensor([list(map(float, row)) for row in counts], dtype=dtype, device="cpu")
        self.steps = self.host[0]
        self.mirror = torch.empty_like(self.host, dtype=torch.float32, device=device)
        self.reflect()

    def reflect(self) -> None:
        self.mirror.copy_(self.host)
        self.known = self.host.clone()

    def catch_up(self) -> None:
        """Takes up what someone has written to a count; by value, as collectives and .data move no version."""
        if not torch.equal(self.host, self.known):
            self.reflect()

    def move(self, moved: Tensor | None, momentum: Callable[[Tensor], Tensor]) -> None:
        """One step of those moved (None: of all); what multiplies the products follows from the new steps."""
        self.steps.add_(1 if moved is None else moved)
        if len(self.host) > 1:
            factors = momentum(self.steps)
            self.host[1].mul_(factors if moved is None else torch.where(moved, factors, 1.0))
        self.known.copy_(self.host)


class Bundle:
    """Built once, launched every step."""

    def __init__(self, kind: Kind, members: Sequence[Member], rule: str, seed: int | None) -> None:
        self.kind, self.members = kind, members
        self.params = [member.param for member in members]
        here = self._local(self.params)
        names = [name for name in kind.states if name is not None]
        addresses = {tables.PARAM.value: [p.data_ptr() for p in here]}
        for i, name in enumerate(kind.states):
            if name is not None:
                addresses[tables.STATES.value + i] = [local(m.state[name]).data_ptr() for m in members]
        addresses |= self._adopt_counters()
        self.param_addresses, self.param_forms = addresses[tables.PARAM.value], Forms(here)
        self.grad_addresses: list[int] | None = None
        self.grad_forms: Forms | None = None
        self.grads: list[Tensor | None] = []
        self.groups: tuple[list, list] = [], []
        self.rows: Tensor | None = None
        self.moved: Tensor | None = None
        self.getters = [operator.itemgetter(name) for name in (*names, *kind.counters)]
        self.states = [member.state for member in members]
        self.entries = [list(map(getter, self.states)) for getter in self.getters]
        self.local_entries = [local(entry) for entry in chain.from_iterable(self.entries)]
        self.entry_addresses = [entry.data_ptr() for entry in self.local_entries]
        self._turn = 0
        # While the tables are used their memory is there, whatever becomes of the state.
        self._memory = [entry.detach() for entry in self.local_entries]
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
        """Whether parameters and state are still the tensors that the tables were made for.

        State is compared by identity, 25 ns an entry; the addresses, 55 ns each, of 16 entries a step: code that
        replaces the data of state in place does so with all of it.
        """
        here = self._local(self.params)
        if list(map(Tensor.data_ptr, here)) != self.param_addresses or not self.param_forms.fit(here):
            return False
        for getter, entries in zip(self.getters, self.entries, strict=True):
            if not all(map(operator.is_, map(getter, self.states), entries)):
                return False
        turn = slice(self._turn, self._turn + 16)
        self._turn = turn.stop if turn.stop < len(self.local_entries) else 0
        return list(map(Tensor.data_ptr, self.local_entries[turn])) == self.entry_addresses[turn]

    def gather(self) -> bool:
        """Takes up the gradients of this step; false where the kernel cannot take one of them."""
        grads: list[Any] = list(map(grad_of, self.params))
        try:
            fit = self.grad_forms is not None and self.grad_forms.fit(grads)
        except (AttributeError, TypeError):  # one is missing
            fit = False
        addresses = list(map(Tensor.data_ptr, grads)) if fit else self._take_one_by_one(grads)
        if addresses is None:
            return False
        self.grads = grads
        if addresses != self.grad_addresses:
            self.tables.set_gradients(addresses)
            self.grad_addresses = addresses
            present = [address != 0 for address in addresses]
            self.moved = None if all(present) else torch.tensor(present, device="cpu")
        return True

    def _take_one_by_one(self, grads: list[Any]) -> list[int] | None:
        """Addresses of gradients that may be missing (0) or lie otherwise than their parameters (copied in `grads`)."""
        direct = not self.kind.distributed
        for i, (grad, param) in enumerate(zip(grads, self.params, strict=True)):
            if grad is None:
                direct = False
                continue
            if not is_gradient(grad, param) or local(grad).dtype != self.kind.grad_dtype:
                return None
            grads[i] = grad = local(grad)
            if not same_layout(grad, local(param)) or grad.is_neg() or grad._is_zerotensor():
                grads[i], direct = copy_in_layout(grad, local(param)), False
        self.grad_forms = Forms(grads) if direct else None  # by which the next ones will do at once
        return [0 if grad is None else grad.data_ptr() for grad in grads]

    def set_groups(self, numbers: list[list[float]], addresses: list[list[int]]) -> None:
        """Hyperparameters of all groups, whose changes alone are uploaded."""
        if (numbers, addresses) != self.groups:
            self.tables.set_groups([*chain.from_iterable(numbers)], [*chain.from_iterable(addresses)])
            self.groups, self.rows = (numbers, addresses), None

    def add_up(self, partials: Tensor, grad_scale: Tensor | None) -> None:
        gradient_norm.add_up(self.tables, self.kind.grad_dtype, partials, grad_scale=grad_scale)

    def step(
        self,
        momentum: Callable[[Tensor, Tensor], Tensor],
        max_norm: float,
        partials: Tensor | None,
        norm: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Launches the step and counts it on the host; momentum (columns of the members' rows, steps) is NAdam's."""
        if self.counts is not None:
            self.counts.catch_up()
        with on(self.kind.device):
            self.launch(max_norm, partials, norm, grad_scale, found_inf)
        increment_version(self.params)  # autograd must know of what the kernel has written
        if self.counts is not None:
            self.counts.move(self.moved, lambda steps: momentum(self._columns(), steps))
        if grad_scale is not None:
            self._give_back_copies()
        self.grads = []  # which are the user's to free

    @torch.no_grad()
    def _give_back_copies(self) -> None:
        """Gradients that the kernel was given in a copy are unscaled there alone."""
        for grad, param in zip(self.grads, self.params, strict=True):
            if grad is not None and param.grad is not None and local(param.grad) is not grad:
                local(param.grad).copy_(grad)

    def _columns(self) -> Tensor:
        if self.rows is None:
            rows = [self.groups[0][member.group] for member in self.members]
            self.rows = torch.tensor(rows, dtype=torch.float64, device="cpu").T
        return self.rows
