"""Which path a call takes (Triton, its interpreter, or eager torch), with its reason, and what machine it is."""

import functools
import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

NOT_INSTALLED = "Triton is not installed"
OLDEST_TRITON, NEXT_TRITON = (3, 6), (4, 0)  # the first that is served, and the first that is not


def _unserved(version: str) -> str:
    """Why that version of Triton is not used; empty if it is."""
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    served = OLDEST_TRITON <= found < NEXT_TRITON
    return "" if served else f"Triton {version} is not served: fastnn is for 3.6 and newer, below 4"


launch: Any = None
tiles: Any = None
_INTERPRETED: Any = False
try:
    import triton

    NO_KERNELS = _unserved(triton.__version__)
    if NO_KERNELS:
        warnings.warn(f"{NO_KERNELS}. Everything runs torch's own ops.", stacklevel=2)
    else:
        from .kernels import launch, tiles  # noqa: F401 - others take them from here
        from .kernels.casts import INTERPRETED as _INTERPRETED
except ImportError as error:  # no Triton (macOS, Windows), or its interpreter asked for where there is no numpy
    NO_KERNELS = NOT_INSTALLED if error.name == "triton" else f"Triton cannot be imported: {error}"

HAS_KERNELS = not NO_KERNELS
INTERPRETED = HAS_KERNELS and bool(getattr(_INTERPRETED, "value", _INTERPRETED))
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MINIMUM_CAPABILITY = (8, 0)  # bf16 and tf32 tensor cores, 163 KiB of shared memory
MAX_FEATURES = 1 << 20  # a tile's offsets are 32-bit: rows of a tile (<= 1024) times features < 2^31


PLAIN, STAND_INS = (Tensor, nn.Parameter), (FakeTensor, FunctionalTensor)


class Machine(NamedTuple):
    """What the plans depend on; l2_bytes is the size of the L2 cache. What was measured on a device has its name."""

    multiprocessors: int
    l2_bytes: int
    capability: tuple[int, int]
    name: str = ""

    @property
    def copies_tiles(self) -> bool:
        """Whether a tensor memory accelerator does, for two programs of 96 KiB each, which 12.x cannot hold."""
        return self.capability[0] in (9, 10)


H100 = Machine(132, 50 << 20, (9, 0))  # whose plans and tiles the interpreter takes


class Path(NamedTuple):
    """name: "triton", "interpreter" or "eager"; reason: why, in words (empty for the kernels' paths)."""

    name: str
    reason: str = ""

    @property
    def eager(self) -> bool:
        return self.name == "eager"


@functools.cache
def _find_cuda_reason(index: int) -> str:
    if torch.version.hip is not None:
        return "ROCm is untested"
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return ""


@torch.compiler.assume_constant_result
def _cuda_reason(index: int) -> str:
    """Why the kernels do not run on that CUDA device; empty if they do. Apart from the cache, which Dynamo warns of."""
    return _find_cuda_reason(index)


@functools.cache
def machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Machine(properties.multi_processor_count, properties.L2_cache_size, capability, properties.name)


def device_path(device: torch.device) -> Path:
    """The path of plain tensors of a served dtype on that device."""
    if not HAS_KERNELS:
        return Path("eager", NO_KERNELS)
    if INTERPRETED:
        if device.type == "cpu":
            return Path("interpreter")
        return Path("eager", f"under TRITON_INTERPRET=1 the kernels take CPU tensors, not {device.type}")
    if device.type != "cuda":
        return Path("eager", f"no kernels for {device.type} tensors")
    reason = _cuda_reason(device.index or 0)
    return Path("eager", reason) if reason else Path("triton")


def is_traced() -> bool:
    """Whether torch.compile traces the call: Dynamo, or AOTAutograd, for which torch 2.11's is_compiling() is False."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def _transform_reason() -> str:
    """A function transform around the call that autograd.Function cannot serve."""
    if is_traced():
        return ""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return ""


def path(input: Tensor, dtype: torch.dtype, features: int, tensors: tuple[Tensor | None, ...]) -> Path:
    """The path of one call; dtype is the computation's (autocast's inside autocast), tensors all others it reads."""
    found = path_of_any_batch(input, dtype, features, tensors)
    if found.eager:
        return found
    if input.numel() == 0:
        return Path("eager", "empty input")
    if input.numel() // input.shape[-1] >= 1 << 31:
        return Path("eager", "2^31 rows or more")
    return found


def path_of_any_batch(input: Tensor, dtype: torch.dtype, features: int, tensors: tuple[Tensor | None, ...]) -> Path:
    """The same, but for what the number of rows decides, in which processes differ."""
    found = device_path(input.device)
    if found.eager:
        return found
    if dtype not in KERNEL_DTYPES:
        return Path("eager", f"no kernels for {dtype}")
    if input.layout is not torch.strided:
        return Path("eager", f"no kernels for {input.layout}")
    if not 0 < features <= MAX_FEATURES:
        return Path("eager", "empty input" if features == 0 else f"more than {MAX_FEATURES} features")
    for tensor in (input, *tensors):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN and not (type(tensor) in STAND_INS and is_traced()):
            return Path("eager", f"tensor subclass {type(tensor).__name__}")
        if tensor.device != input.device:
            return Path("eager", "tensors on different devices")
        if tensor.dtype not in KERNEL_DTYPES:
            return Path("eager", f"no kernels for {tensor.dtype} parameters")
        if tensor.layout is not torch.strided or (tensor.dim() == 1 and not tensor.is_contiguous()):
            return Path("eager", "sparse or strided parameters")
    reason = _transform_reason()
    return Path("eager", reason) if reason else found
