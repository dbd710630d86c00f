"""Which parameters the kernels step, in which bundles, and which are left to torch's own step."""

import operator
from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from ..memory import copy_in_layout, is_dense, on, same_layout
from .algorithm import Algorithm, is_addressable
from .bundle import Bundle, Kind, Member, is_distributed, is_gradient, local
from .checkpoints import counts_on_device
from .eager import check

Group = dict[str, Any]


def is_readable(value: Any, device: torch.device) -> bool:
    """Whether a hyperparameter is at hand for kernel or host without waiting."""
    if not isinstance(value, Tensor):
        return True
    return value.numel() == 1 and (value.is_cpu or is_addressable(value, device))


def same_objects(found: Collection, known: Collection) -> bool:
    return len(found) == len(known) and all(map(operator.is_, found, known))


def overlaps(params: list[Tensor]) -> set[Tensor]:
    """Parameters that share memory with others or are listed twice: torch steps them one after the other."""
    found: set[Tensor] = set()
    last, end = None, 0
    strided = (p for p in params if local(p).layout is torch.strided and p.numel())
    for param in sorted(strided, key=lambda p: (str(p.device), local(p).data_ptr())):
        start = local(param).data_ptr()
        if last is not None and last.device == param.device and start < end:
            found |= {last, param}
        here = local(param)
        span = 1 + sum((size - 1) * stride for size, stride in zip(here.shape, here.stride(), strict=True))
        if last is None or last.device != param.device or start + span * here.itemsize > end:
            last, end = param, start + span * here.itemsize
    return found


def is_served(optimizer: Algorithm, group: Group, param: Tensor) -> bool:
    """Whether the kernels step this parameter, with the gradient it has now if it has one."""
    here, grad = local(param), param.grad
    return (
        not group["differentiable"]
        and (type(param) in (Tensor, nn.Parameter) or is_distributed(param))
        and not dispatch.device_path(here.device).eager
        and here.dtype in dispatch.KERNEL_DTYPES
        and here.layout is torch.strided
        and here.numel() > 0
        and is_dense(here)
        and (grad is None or (is_gradient(grad, param) and grad.dtype in dispatch.KERNEL_DTYPES))
        and all(is_readable(value, here.device) for value in optimizer.hyperparameters(group))
    )


def kind_of(optimizer: Algorithm, group: Group, param: Tensor) -> Kind | None:
    """The bundle of a served parameter; None where its state is not one the kernels can take."""
    state, here = optimizer.state.get(param, {}), local(param)
    names, on_device = optimizer.state_names(group), counts_on_device(group)
    present = [local(state.get(name)) for name in names if name is not None]
    counts = [state.get(name) for name in optimizer.counters]
    if not all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in present):
        return None
    if any(t.shape != here.shape for t in present):
        return None
    if not all(isinstance(count, Tensor) and count.numel() == 1 for count in counts):
        return None
    if on_device and not all(c.device == here.device and c.dtype == torch.float32 for c in counts):
        return None
    dtypes = {tensor.dtype for tensor in present} or {here.dtype}
    if len(dtypes) > 1 or not dtypes <= set(dispatch.KERNEL_DTYPES) or any(t.device != here.device for t in present):
        return None
    for name in filter(None, names):
        if not same_layout(local(state[name]), here):  # loaded from a parameter that lay otherwise
            if is_distributed(param):
                return None
            state[name] = copy_in_layout(state[name], here)
    grad_dtype = here.dtype if param.grad is None else param.grad.dtype
    return Kind(
        here.device, is_distributed(param), here.dtype, grad_dtype, dtypes.pop(), names, optimizer.counters, on_device
    )


class Plan:
    """The bundles of an optimizer's parameters as they are now.

    waiting: served parameters that have had no gradient yet; eager: for each group those left to torch.
    """

    def __init__(self, optimizer: Algorithm) -> None:
        groups = optimizer.param_groups
        self.state, self.group_values = optimizer.state, [*chain.from_iterable(g.values() for g in groups)]
        self.params = [*chain.from_iterable(g["params"] for g in groups)]
        self.grouped = [list(group["params"]) for group in groups]
        self.structure = [optimizer.structure(group) for group in groups]
        self.waiting: list[Tensor] = []
        self.eager: list[list[Tensor]] = [[] for _ in groups]
        members: dict[Kind, list[Member]] = defaultdict(list)
        overlapping = overlaps(self.params)
        served: list[tuple[int, Tensor]] = []
        for i, group in enumerate(groups):
            for param in group["params"]:
                if param in overlapping or not is_served(optimizer, group, param):
                    self.eager[i].append(param)
                elif param.grad is None and not optimizer.state.get(param):
                    self.waiting.append(param)
                else:
                    served.append((i, param))
        optimizer.forget_others(self.params)
        self._create_and_sort(optimizer, served, members)
        self.bundles = [
            Bundle(kind, of_kind, optimizer.rule, optimizer.next_seed()) for kind, of_kind in members.items()
        ]
        self.eager_params = [*chain.from_iterable(self.eager)]
        self.counts_on_host = any(bundle.counts is not None for bundle in self.bundles)
        devices = {bundle.kind.device for bundle in self.bundles}
        self.adds_up = len(devices) == 1 and not any(bundle.kind.distributed for bundle in self.bundles)
        self.entries = list(self.state.values())
        self.set_groups(optimizer)

    def _create_and_sort(
        self, optimizer: Algorithm, served: list[tuple[int, Tensor]], members: dict[Kind, list[Member]]
    ) -> None:
        """Gives served parameters their state and sorts them by kind. Where anything raises, nothing has changed."""
        groups, created = optimizer.param_groups, []
        for group in groups:
            optimizer.row(group, None)
        check(optimizer, self.eager)
        try:
            for i, param in served:
                if not optimizer.state.get(param):
                    created.append(param)
                optimizer.init_state(groups[i], param)
                kind = kind_of(optimizer, groups[i], param)
                if kind is None:
                    self.eager[i].append(param)
                else:
                    hidden = optimizer.hidden_count(groups[i], param)
                    members[kind].append(Member(param, optimizer.state.get(param, {}), i, hidden))
            check(optimizer, self.eager)  # who has joined them
        except BaseException:
            for param in created:
                optimizer.state.pop(param, None)
            raise

    def gather(self) -> bool:
        return all(bundle.gather() for bundle in self.bundles)

    def needs_torch(self, max_grad_norm: float | None, found_inf: Tensor | None) -> bool:
        """Whether a step is not the kernels' alone, or they cannot say without waiting whether it is to be made."""
        return (
            bool(self.eager_params)
            or (max_grad_norm is not None and not self.adds_up)
            or (found_inf is not None and self.counts_on_host)
        )

    def add_up(self, grad_scale: Tensor | None) -> Tensor:
        """Partial sums of all gradients' squares, a launch for each bundle."""
        device, sizes = self.bundles[0].kind.device, [bundle.partials for bundle in self.bundles]
        grad_scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
        partials = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        for bundle, part in zip(self.bundles, partials.split(sizes), strict=True):
            with on(device):
                bundle.add_up(part, grad_scale)
        return partials

    def launch(
        self,
        momentum: Callable[[Tensor, Tensor], Tensor],
        max_norm: float,
        partials: Tensor | None = None,
        norm: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """A launch for each bundle, which is given what lies on another device in a copy."""
        given = partials, norm, grad_scale, found_inf
        for bundle in self.bundles:
            device = bundle.kind.device
            bundle.step(momentum, max_norm, *(t if t is None else t.to(device, non_blocking=True) for t in given))

    def set_groups(self, optimizer: Algorithm) -> None:
        """Hyperparameters as they are now, of the groups that each bundle has members of; raises before any changes."""
        groups, rows, addressed = optimizer.param_groups, [], []
        reads_in_place = any(isinstance(group.get("betas"), list) for group in groups)
        for bundle in self.bundles:
            device, used = bundle.kind.device, {member.group for member in bundle.members}
            rows.append([optimizer.row(group, device if i in used else None) for i, group in enumerate(groups)])
            for value in chain.from_iterable(optimizer.hyperparameters(groups[i]) for i in used):
                if is_addressable(value, device):
                    addressed.append((value, value.data_ptr(), value.detach()))  # whose memory so stays
                elif isinstance(value, Tensor):
                    reads_in_place = True
        for bundle, of_bundle in zip(self.bundles, rows, strict=True):
            bundle.set_groups([numbers for numbers, _ in of_bundle], [addresses for _, addresses in of_bundle])
        self.l1, self.reads_in_place, self.addressed = optimizer.l1, reads_in_place, addressed

    def holds(self, optimizer: Algorithm) -> bool:
        """Whether the plan still fits; changed numbers are taken up on the way.

        Everything is compared by identity, 25 ns a tensor: whoever changes a group or the state puts another object
        there. Tensors written in place are no exception: the kernel reads them itself, or `reads_in_place` is set.
        """
        groups = optimizer.param_groups
        if (
            self.state is not optimizer.state
            or not same_objects(self.state.values(), self.entries)
            or len(groups) != len(self.grouped)
            or not all(map(same_objects, (group["params"] for group in groups), self.grouped))
            or not all(bundle.holds() for bundle in self.bundles)
            or any(param.grad is not None for param in self.waiting)
        ):
            return False
        values = [*chain.from_iterable(g.values() for g in groups)]
        if same_objects(values, self.group_values):
            there = all(tensor.data_ptr() == address for tensor, address, _ in self.addressed)
            if there and self.l1 == optimizer.l1 and not self.reads_in_place:
                return True
        elif [optimizer.structure(group) for group in groups] != self.structure:
            return False
        self.set_groups(optimizer)
        self.group_values = values
        return True
