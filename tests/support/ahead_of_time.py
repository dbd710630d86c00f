"""Compiles real launches for NVIDIA GPUs without one, and reads what the compiler made of them.

For processes in which TRITON_INTERPRET was not set when the kernels were imported (support/processes.py).
"""

import gc
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastnn import plans
from fastnn.kernels.launch import forget_compiled

KIB = 1024
THREADS_PER_WARP = 32
SHARED_PER_BLOCK = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}

USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
# Its address, its name with modifiers, and where it branches to.
INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:\s+(?:!?U?PT?\d*, )?0x([0-9a-f]+) ;)?", re.MULTILINE
)
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class Launch(NamedTuple):  # a tenth of the time of a dataclass, which a measured launch would pay for
    kernel: str
    grid: tuple[int, int, int]
    compiled: CompiledKernel


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a GPU. Instructions are counted as they stand in the code, not as they run."""

    registers: int  # per thread
    stack: int  # bytes per thread: what did not fit into registers
    shared: int  # bytes per block
    loads: dict[int, int]  # from global memory, by width in bits
    stores: dict[int, int]  # to global memory, by width in bits
    async_copies: dict[int, int]  # from global to shared memory, by width in bits
    tensor_core: int
    instructions: int
    opcodes: dict[str, int]  # all instructions by name without modifiers: "FADD", "SHFL", "LDL", "STL"...
    loops: list[dict[str, Any]]  # "instructions", "loads" and "stores" of each innermost loop


@contextmanager
def stand_in_driver(capability: int) -> Iterator[list[Launch]]:
    """Makes `kernel[grid](...)` on CPU tensors compile for a GPU and list the launch instead of running it.

    Uses a compile cache of its own, unless TRITON_CACHE_DIR is set.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET before importing triton: kernels would be interpreted")
    stand_in, previous = _StandInDriver(capability), driver._active
    with ExitStack() as stack:
        if "TRITON_CACHE_DIR" not in os.environ:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(patch.dict(os.environ, TRITON_CACHE_DIR=folder))
        stack.enter_context(patch.object(CompiledKernel, "_init_handles", stand_in.loading()))
        _clear_caches()
        driver.set_active(stand_in)
        try:
            yield stand_in.launches
        finally:
            stand_in.unload()
            _clear_caches()
            driver.set_active(previous)


def _clear_caches() -> None:
    """Triton keeps compiled kernels by device, and every capability is device 0 here."""
    for candidate in gc.get_objects():
        # isinstance would ask lazy modules and proxies for their class, which may import or warn.
        if type(candidate) is JITFunction:
            candidate.device_caches.clear()
    forget_compiled()
    plans.generation += 1


class _StandInDriver:
    """What Triton asks of a driver when it compiles, loads and launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: list[Launch] = []
        self.loaded: dict[int, CompiledKernel] = {}
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            unload_module=lambda module: None,
            get_device_properties=self._get_device_properties,
        )

    def loading(self) -> Callable[[CompiledKernel], None]:
        init_handles = CompiledKernel._init_handles

        def load(kernel: CompiledKernel) -> None:
            arch = kernel.metadata.target.arch
            if arch != self.capability:
                raise RuntimeError(f"{kernel.name}, kept from sm_{arch}, was launched on sm_{self.capability}")
            init_handles(kernel)
            self.loaded[kernel.function] = kernel

        return load

    def unload(self) -> None:
        """Leaves kernels as before their first launch: Triton 3.9 would ask a driver to unload them."""
        for kernel in self.loaded.values():
            kernel.module = kernel.function = kernel._run = None

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            kernel = self.loaded[function]
            self.launches.append(Launch(kernel.name, (x, y, z), kernel))

        return launch

    def _load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        module = function = len(self.loaded) + 1
        registers, spills, max_threads = 0, 0, 1024
        return module, function, registers, spills, max_threads

    def _get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_PER_BLOCK[self.capability],
            "max_num_regs": 64 * KIB,
            "multiprocessor_count": MULTIPROCESSORS[self.capability],
            "warpSize": 32,
        }

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)


def describe(launch: Launch) -> dict[str, Any]:
    """Kernel and resources as a JSON row, and "elements": of a tile, how many one thread handles; 0 without a tile."""
    source = launch.compiled.src
    constants = {source.fn.arg_names[place[0]]: value for place, value in source.constants.items()}
    tile = constants.get("BLOCK", constants.get("ROWS", 0) * constants.get("COLS", 0))
    elements = tile // (THREADS_PER_WARP * launch.compiled.metadata.num_warps)
    return {"kernel": launch.kernel, "elements": elements, **vars(resources(launch.compiled))}


def resources(compiled: CompiledKernel) -> Resources:
    """Reads the machine code with the cuobjdump that Triton brings along."""
    dump = _cuobjdump(compiled.asm["cubin"])
    usage = [tuple(map(int, numbers)) for numbers in USAGE.findall(dump)]
    addressed = [instruction for instruction in INSTRUCTION.findall(dump) if instruction[1] != "NOP"]
    code = [name for _, name, _ in addressed]
    if not usage or not code:
        raise RuntimeError(f"cuobjdump does not know the code of {compiled.name} for {compiled.metadata.target}")
    opcodes = Counter(instruction.split(".")[0] for instruction in code)
    return Resources(
        registers=max(registers for registers, _, _ in usage),
        stack=max(stack + local for _, stack, local in usage),
        shared=compiled.metadata.shared,
        loads=_widths(code, "LDG"),
        stores=_widths(code, "STG"),
        async_copies=_widths(code, "LDGSTS"),
        tensor_core=sum(count for opcode, count in opcodes.items() if opcode.endswith("MMA")),
        instructions=len(code),
        opcodes=dict(opcodes),
        loops=_innermost_loops(addressed),
    )


def _innermost_loops(code: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """What lies between a branch and the address before it that it leads to; a branch to itself ends every kernel."""
    jumps = [(int(to, 16), int(at, 16)) for at, name, to in code if name.split(".")[0] == "BRA" and to]
    spans = [(start, end) for start, end in jumps if start < end]
    inner = [span for span in spans if not any(span[0] <= s and e <= span[1] and (s, e) != span for s, e in spans)]
    bodies = [[name for at, name, _ in code if start <= int(at, 16) <= end] for start, end in inner]
    return [{"instructions": len(b), "loads": _widths(b, "LDG"), "stores": _widths(b, "STG")} for b in bodies]


def _cuobjdump(cubin: bytes) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", "--dump-sass", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _widths(code: list[str], opcode: str) -> dict[int, int]:
    modifiers = [instruction.split(".")[1:] for instruction in code if instruction.split(".")[0] == opcode]
    return dict(Counter(next((WIDTHS[name] for name in names if name in WIDTHS), 32) for names in modifiers))
