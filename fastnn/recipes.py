"""Blocks prepared: plan, tiles and launches settled once for a shape, then run in a few microseconds of the host."""

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from . import memory, plans
from .dispatch import launch, tiles
from .specs import BlockSpec, saved_elements, stats_of

_KEPT = 4096  # recipes of each direction, the least used forgotten first

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def seed_arguments(seed: Tensor | None) -> tuple[Tensor | None, Any]:
    """A seed on the host goes to the kernel as a value, one on the device (tracing, capture) by its address."""
    if seed is None:
        return None, 0
    return (None, seed.item()) if seed.is_cpu else (seed, 0)


class _Recipe:
    """The launches of a spec in one direction, and the memory they take."""

    def __init__(self, spec: BlockSpec) -> None:
        self.spec, self.settings, self.values = spec, spec.settings, spec.values
        self.linear, self.has_stats = spec.K > 0, spec.settings.norm != "none"
        self.launches: list[Any] = []
        self.compiled = False  # all of them, so that they may be launched by address
        self.partials: int | None = None  # fp32, what one launch leaves to the next
        self.descriptors: Any = None  # tiles of a product whose operands are copied by them
        self.shape, self.strides = (spec.M, spec.N), (spec.N, 1)
        self.empty, self.dtype = memory.allocator(spec.device), spec.dtype
        self.index = spec.device.index if spec.device.type == "cuda" else None

    def _keep_z(self, keeps: bool) -> None:
        self.keeps_z = keeps
        found = saved_elements(*self.shape, self.spec.dtype, self.settings, keeps)
        self.z_begin, self.elements = found
        self.z_address = self.z_begin * self.spec.dtype.itemsize

    def _statistics_plan(self) -> tuple[str, Any]:
        """Plan and tiles of kernels that walk z, with sums over its rows."""
        p, itemsize = self.spec, self.spec.dtype.itemsize
        plan = plans.statistics_plan(p.M, p.N, itemsize, p.device)
        rule = tiles.columns_tiles if plan == "columns" else tiles.split_tiles
        return plan, rule(p.M, p.N, itemsize, p.multiprocessors)

    def _scratch(self) -> Tensor | None:
        if self.partials is None:
            return None
        return self.empty((self.partials,), (1,), torch.float32)

    def _z_of(self, saved: Tensor) -> Tensor:
        return saved.as_strided(self.shape, self.strides, saved.storage_offset() + self.z_begin)

    def _launch(self, tensors: tuple[Any, ...], saved: Tensor, operands: int, seed: int) -> None:
        """tensors: as launch.FORWARD or BACKWARD names them, but for z, stats and the seed.

        operands: where among them are the input and the weight.
        """
        x, weight = tensors[operands : operands + 2]
        if self.compiled and x.is_contiguous() and (weight is None or weight.is_contiguous()):
            addresses: list[Any] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            if functools.reduce(operator.or_, addresses) % tiles.ACCESS_BYTES == 0:
                stats = saved.data_ptr()
                z = stats + self.z_address if self.keeps_z else 0 if self.linear else addresses[operands]
                if self.descriptors is not None:
                    addresses[operands : operands + 2] = launch.descriptors(x, weight, self.descriptors)
                launch.by_address(self.launches, (*addresses, z, stats if self.has_stats else 0, seed))
                return
        self._launch_by_triton(list(tensors), saved, operands, seed)
        self.compiled = all(step.is_compiled for step in self.launches)

    def _launch_by_triton(self, tensors: list[Any], saved: Tensor, operands: int, seed: int) -> None:
        for place in (operands, operands + 1):
            if tensors[place] is not None:
                tensors[place] = tensors[place].contiguous()
        aligned = (
            not functools.reduce(operator.or_, [t.data_ptr() for t in tensors if t is not None]) % tiles.ACCESS_BYTES
        )
        z = self._z_of(saved) if self.keeps_z else None if self.linear else tensors[operands]
        stats = stats_of(saved, self.spec.N) if self.has_stats else None
        if self.descriptors is not None:
            x, weight = (
                t.clone() if t.data_ptr() % tiles.ACCESS_BYTES else t for t in tensors[operands : operands + 2]
            )
            tensors[operands : operands + 2] = launch.descriptors(x, weight, self.descriptors)
        for step in self.launches:
            step.by_triton((*tensors, z, stats, seed), keep=aligned)


class Forward(_Recipe):
    """(out, saved) of a block; saved is scratch where no backward follows."""

    def __init__(self, spec: BlockSpec, save: bool) -> None:
        super().__init__(spec)
        alone, linear = self.settings.is_linear_alone, self.linear
        self.backwards: dict[tuple[bool, bool, bool], tuple[tuple, Backward]] = {}
        self.library = linear and not self._takes_our_product(save and not alone)
        if not linear or (self.library and not alone):
            self._walk_z()
        self._keep_z(linear and not alone and (save or self.library or self.partials is not None))

    def backward(self, needs_linear: tuple[bool, bool, bool]) -> "Backward":
        """needs_linear: which of the gradients by input, weight and bias are asked for."""
        state = plans.state(self.spec.device)
        settled, found = self.backwards.get(needs_linear, (None, None))
        if found is None or settled != state:
            found = backward(self.spec, needs_linear)
            self.backwards[needs_linear] = state, found
        return found

    def _takes_our_product(self, save: bool) -> bool:
        p, norm = self.spec, self.settings.norm
        M, N, K, dtype = p.M, p.N, p.K, p.dtype
        plan = plans.forward_plan(M, N, K, dtype, p.device, norm, save)
        if plan not in ("whole_batch", "epilogue") or (self.settings.is_linear_alone and p.computes_as_stored):
            return False
        precision, split = plans.product_precision(dtype), plans.splits(dtype)
        shape: Any
        if plan == "whole_batch":
            assert p.dtypes[0] is not None
            shape = tiles.whole_batch_tiles(M, K, max(p.dtypes[0].itemsize, dtype.itemsize), split)
            self.launches = launch.forward_whole_batch(self.values, shape, precision)
        elif norm == "batch":
            strips = tiles.linear_statistics_tiles(M, N, p.widest, split, p.copies_tiles, p.multiprocessors)
            self.launches = launch.forward_linear_statistics(self.values, strips, precision)
            self.partials, shape = strips.apply.chunks * 3 * N, strips.product
        else:
            shape = tiles.linear_tiles(M, N, K, p.widest, norm == "running", p.copies_tiles, p.multiprocessors)
            self.launches = launch.forward_linear(self.values, shape, precision)
        self.descriptors = shape if shape.descriptors else None
        return True

    def _walk_z(self) -> None:
        """By kernels that read z: the input, or what the library makes of it."""
        plan, shape = self._statistics_plan()
        if self.settings.norm != "batch":
            plan = "apply"
        elif plan == "split":
            self.partials = shape.chunks * 3 * self.spec.N
        self.launches = getattr(launch, "forward_" + plan)(self.values, shape)

    def __call__(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self.index is not None and torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):  # Triton launches on the current one, whatever its arguments'
                return self(input, weight, bias, gamma, beta, running_mean, running_var, batches, seed)
        out, saved = self.empty(self.shape, self.strides, self.dtype), self.empty((self.elements,), (1,), self.dtype)
        if self.library:
            assert weight is not None
            z = self._z_of(saved) if self.keeps_z else out
            if bias is None:  # into an out= tensor, which autocast leaves alone
                torch.mm(input, weight.t(), out=z)
            else:
                torch.addmm(bias, input, weight.t(), out=z)
        if self.launches:
            on_device, value = seed_arguments(seed)
            tensors = (
                input, weight, bias, gamma, beta, running_mean, running_var, batches, on_device, self._scratch(), out,
            )  # fmt: skip
            self._launch(tensors, saved, 0, value)
        return out, saved


class Backward(_Recipe):
    """Gradients by input, weight, bias, gamma and beta: None where there are none, or none are needed."""

    def __init__(self, spec: BlockSpec, needs_linear: tuple[bool, bool, bool]) -> None:
        super().__init__(spec)
        self.needs_input, self.needs_weight, self.needs_bias = needs_linear
        self.alone = self.linear and self.settings.is_linear_alone
        if not self.alone:
            plan, shape = self._statistics_plan()
            self.launches = getattr(launch, "backward_" + plan)(self.values, shape)
            self.partials = shape.chunks * 2 * spec.N if plan == "split" else None
        M, N, K = spec.M, spec.N, spec.K
        self.columns, self.input_shape, self.weight_shape, self.input_strides = (N,), (M, K), (N, K), (K, 1)
        self.grouped = self.linear and self._groups_products()
        self.makes_dx, self.makes_dweight = self.linear and self.needs_input, self.linear and self.needs_weight
        self.makes_dbias = self.needs_bias and spec.dtypes[2] is not None and (self.grouped or not self.alone)
        if self.grouped:
            shape, precision = tiles.linear_backward_tiles(spec.widest), plans.product_precision(spec.dtype)
            self.launches += launch.backward_linear(self.values, shape, precision, self.needs_input)
        self._keep_z(self.linear and not self.alone)

    def _groups_products(self) -> bool:
        p = self.spec
        several = self.needs_input or (self.needs_bias and self.alone) or not p.computes_as_stored
        plan = plans.linear_backward_plan(p.M, p.N, p.K, p.dtype, p.device)
        return self.needs_weight and several and plan == "grouped"

    def __call__(
        self, grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, gamma: Tensor | None,
        beta: Tensor | None, saved: Tensor, seed: Tensor | None,
    ) -> Gradients:  # fmt: skip
        if self.index is not None and torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self(grad, input, weight, bias, gamma, beta, saved, seed)
        grad = grad.contiguous()
        if saved.data_ptr() % tiles.ACCESS_BYTES or not saved.is_contiguous():  # unpacked by hooks to where they like
            saved = saved.clone(memory_format=torch.contiguous_format)
        dz = grad if self.alone else self.empty(self.shape, self.strides, self.dtype)
        dtypes: tuple[Any, ...] = self.spec.dtypes
        dgamma = None if gamma is None else self.empty(self.columns, (1,), dtypes[3])
        dbeta = None if beta is None else self.empty(self.columns, (1,), dtypes[4])
        dbias = self.empty(self.columns, (1,), dtypes[2]) if self.makes_dbias else None
        dx = self.empty(self.input_shape, self.input_strides, dtypes[0]) if self.makes_dx else None
        dweight = self.empty(self.weight_shape, self.input_strides, dtypes[1]) if self.makes_dweight else None
        if self.launches:
            on_device, value = seed_arguments(seed)
            tensors = (
                grad, input, weight, gamma, beta, on_device, self._scratch(), dz, dgamma, dbeta,
                None if self.alone else dbias, dx, dweight, dbias if self.alone else None,
            )  # fmt: skip
            self._launch(tensors, saved, 1, value)
        if not self.linear:
            dx = dz
        elif not self.grouped:
            assert weight is not None
            if dx is not None:
                torch.mm(dz, weight, out=dx)
            if dweight is not None:
                torch.mm(dz.t(), input, out=dweight)
            if self.needs_bias and self.alone:
                dbias = dz.sum(0)
        return dx, dweight, dbias, dgamma, dbeta


@functools.lru_cache(_KEPT)
def _forward(spec: BlockSpec, save: bool, state: tuple) -> Forward:
    return Forward(spec, save)


@functools.lru_cache(_KEPT)
def _backward(spec: BlockSpec, needs_linear: tuple[bool, bool, bool], state: tuple) -> Backward:
    return Backward(spec, needs_linear)


def forward(spec: BlockSpec, save: bool) -> Forward:
    """save: whether a backward follows."""
    return _forward(spec, save, plans.state(spec.device))


def backward(spec: BlockSpec, needs_linear: tuple[bool, bool, bool]) -> Backward:
    """needs_linear: which of the gradients by input, weight and bias are asked for."""
    return _backward(spec, needs_linear, plans.state(spec.device))
