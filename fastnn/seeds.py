"""Where the seed of a dropout mask comes from."""

import functools
import threading

import torch
from torch import Tensor

from .dispatch import is_traced

_SEED_DOMAIN = 0x6661_7374_6E6E  # "fastnn": keeps our Philox keys apart from torch's own use of (seed, offset)
_WORD64 = (1 << 64) - 1
_generator_lock = threading.Lock()


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words without visible pattern."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD64
    return value ^ (value >> 31)


@functools.lru_cache(64)
def _hash(seed: int) -> int:
    return _mix(seed ^ _SEED_DOMAIN)


def dropout_seed(device: torch.device) -> Tensor:
    """A fresh () int64 seed of one dropout mask, governed by torch.manual_seed.

    In plain eager mode on CUDA it is a hash of the generator's seed and offset, taken on the host without a
    launch, as a CPU tensor. Under tracing it is torch.randint on the device, the one draw that torch.compile never
    merges with another layer's; under graph capture too, so that each replay draws anew. On any stream but the
    default one as well: a kernel with a seed on the device is another one, which the usual warm-up on a side stream
    then loads, as a capture should not.
    """
    if device.type != "cuda" or is_traced() or _on_side_stream(device):
        return torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64, device=device)
    generator = torch.cuda.default_generators[device.index]
    with _generator_lock:
        offset = generator.get_offset()
        generator.set_offset(offset + 4)
    key = _mix(_hash(generator.initial_seed()) + offset & _WORD64)
    return torch.scalar_tensor(key >> 1, dtype=torch.int64, device="cpu")  # half the time of torch.tensor


def _on_side_stream(device: torch.device) -> bool:
    """Whether the current stream is not the default one, which cannot be captured; 0.1 µs."""
    return torch._C._cuda_getCurrentRawStream(device.index) != 0
