"""What decides how a block runs, and the memory it keeps for its backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .dispatch import tiles


class BlockSpec(NamedTuple):
    """All that decides how a block runs; K is 0 without a Linear.

    dtypes: of its tensors (input, weight, bias, gamma, beta and the three buffers), None for those there are not.
    """

    device: torch.device
    M: int
    N: int
    K: int
    dtype: torch.dtype  # of the computation, and of the output
    dtypes: tuple[torch.dtype | None, ...]
    settings: Any  # launch.Settings
    seed_on_device: bool

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor | None], dtype: torch.dtype, settings: Any, seed: Tensor | None
    ) -> "BlockSpec":
        """tensors: input (M, K), weight, bias, gamma, beta, running_mean, running_var, num_batches_tracked."""
        input, weight = tensors[:2]
        assert input is not None
        M, K = input.shape
        sizes = (M, K, 0) if weight is None else (M, weight.shape[0], K)
        dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        return cls(input.device, *sizes, dtype, dtypes, settings, seed is not None and not seed.is_cpu)

    @property
    def values(self) -> dict[str, Any]:
        return self.settings.values(self.M, self.N, self.K, self.dtype.itemsize, counts=self.dtypes[7] is not None)

    @property
    def multiprocessors(self) -> int:
        return dispatch.machine(self.device).multiprocessors

    @property
    def widest(self) -> int:
        """Bytes of an element of the Linear's operands as they are stored, or as they are computed."""
        return max(dtype.itemsize for dtype in (*self.dtypes[:2], self.dtype) if dtype is not None)

    @property
    def computes_as_stored(self) -> bool:
        """Whether the Linear's operands are of the computation's dtype."""
        return all(dtype in (None, self.dtype) for dtype in self.dtypes[:3])

    @property
    def copies_tiles(self) -> bool:
        """Whether our product may take its operands by descriptors, whose rows are 16-byte aligned."""
        rows = self.K * self.dtype.itemsize % tiles.ACCESS_BYTES == 0
        return rows and self.computes_as_stored and dispatch.machine(self.device).copies_tiles


def saved_elements(M: int, N: int, dtype: torch.dtype, settings: Any, keeps_z: bool) -> tuple[int, int]:
    """(where z begins, all): of the one allocation a block makes for its backward.

    It holds mean and reciprocal standard deviation, (2, N) fp32, where there is BatchNorm, and z (M, N), from the next
    multiple of 16 bytes on.
    """
    begin = 0 if settings.norm == "none" else (N + 1) // 2 * (16 // dtype.itemsize)
    return begin, begin + M * N * int(keeps_z)  # torch 2.11 multiplies no symbol by a bool


def stats_of(saved: Tensor, N: int) -> Tensor:
    """The view (2, N) fp32 of what a block saved."""
    stats = saved[: 8 * N // saved.element_size()]
    if stats.storage_offset() * stats.element_size() % 4:
        stats = stats.clone()
    return stats.view(torch.float32).view(2, N)
