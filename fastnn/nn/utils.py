"""torch.nn.utils.clip_grad_norm_ in two launches."""

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import dispatch
from ..memory import is_capturing, is_dense, on

if dispatch.HAS_KERNELS:
    from ..kernels import gradient_norm
    from ..kernels.tables import GRAD, Tables
if TYPE_CHECKING:
    from ..kernels.tables import Tables

ORDERS = {1.0: 1, 2.0: 2, math.inf: 0}  # of the norm, and how the kernels name it
_captured: list["Tables"] = []  # that graphs read again at every replay


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clips the norm of all gradients as one vector: :func:`torch.nn.utils.clip_grad_norm_`, arguments and result.

    Two launches for all gradients of a dtype, for norms 1, 2 and infinity of dense float32, float16 and bfloat16
    gradients of one device; any others, and ``error_if_nonfinite=True``, which waits for the norm, are left to torch.

    Args:
        parameters: those whose ``.grad`` is clipped, in place.
        max_norm: the largest norm left.
        norm_type: the order of the norm.
        error_if_nonfinite: raises if the norm is NaN or infinite; no gradient has changed then.
        foreach: as in torch, where torch clips.

    Returns:
        The norm () before clipping, on the gradients' device, in their (promoted) dtype.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``.
    """
    given, parameters = parameters, [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if error_if_nonfinite or float(norm_type) not in ORDERS or not _are_served(grads):
        # An empty generator as it came: torch warns of it.
        return torch.nn.utils.clip_grad_norm_(parameters or given, max_norm, norm_type, error_if_nonfinite, foreach)
    device, order = grads[0].device, ORDERS[float(norm_type)]
    norm = torch.empty((), dtype=functools.reduce(torch.promote_types, (grad.dtype for grad in grads)), device=device)
    dtypes = list(dict.fromkeys(grad.dtype for grad in grads))
    walks = [(dtype, _tables([grad for grad in grads if grad.dtype == dtype], device)) for dtype in dtypes]
    sizes = [gradient_norm.partials_of(tables) for _, tables in walks]
    partials = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    with on(device):
        for (dtype, tables), part in zip(walks, partials.split(sizes), strict=True):
            gradient_norm.add_up(tables, dtype, part, order)
        for dtype, tables in walks:
            gradient_norm.clip(tables, dtype, partials, norm, float(max_norm), order)
    increment_version(grads)
    return norm


def _are_served(grads: list[Tensor]) -> bool:
    return (
        bool(grads)
        and not dispatch.device_path(grads[0].device).eager
        and len(set(map(id, grads))) == len(grads)
        and all(_is_served(grad, grads[0].device) for grad in grads)
    )


def _is_served(grad: Tensor, device: torch.device) -> bool:
    return (
        type(grad) is Tensor
        and grad.layout is torch.strided
        and grad.dtype in dispatch.KERNEL_DTYPES
        and grad.device == device
        and grad.numel() > 0
        and is_dense(grad)
        and not grad.is_neg()
        and not grad._is_zerotensor()
    )


def _tables(grads: list[Tensor], device: torch.device) -> "Tables":
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = tuple(grad.data_ptr() for grad in grads), tuple(grad.numel() for grad in grads), device, stream
    if not is_capturing():
        return _make_tables(*key)
    _make_tables.cache_clear()  # the next capture's warm-up is to set pinned memory aside again
    _captured.append(_make_tables.__wrapped__(*key))
    return _captured[-1]


@functools.lru_cache(maxsize=8)  # gradients mostly come back to the addresses they had
def _make_tables(addresses: tuple[int, ...], sizes: tuple[int, ...], device: torch.device, stream: int) -> "Tables":
    return Tables({GRAD.value: addresses}, sizes, [0] * len(sizes), device, dispatch.machine(device).multiprocessors)
