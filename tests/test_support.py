"""The tools of tests/support find what they are for: rereads, races, narrow accesses, spilled registers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support.ahead_of_time import Launch, resources, stand_in_driver
from support.compiled import instructions_per_element, wide_share
from support.host_reads import NoHostReads
from support.interpreter import Bytes, TensorBytes, count_accesses, shuffled_grid
from support.ops_log import OpsLog
from support.processes import in_interpreter, without_interpreter
from triton.runtime.driver import driver
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

CAPABILITIES = (80, 90, 100)


@triton.jit
def read_twice(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.load(x_ptr + offsets, mask=mask)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def tally(count_ptr, last_ptr):
    tl.atomic_add(count_ptr, 1)
    tl.atomic_cas(last_ptr, 0, 1)


@triton.jit
def visit(clock_ptr, visits_ptr):
    columns, layers = tl.num_programs(1), tl.num_programs(2)
    program = (tl.program_id(0) * columns + tl.program_id(1)) * layers + tl.program_id(2)
    time = tl.load(clock_ptr)
    tl.store(visits_ptr + time, program)
    tl.store(clock_ptr, time + 1)


@triton.jit
def race(flag_ptr, seen_ptr):
    program = tl.program_id(0)
    if program == 0:
        tl.store(flag_ptr, 1)
    tl.store(seen_ptr + program, tl.load(flag_ptr))


@triton.jit
def divide_by_sum(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x / tl.sum(x))


@triton.jit
def square(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, size, BLOCK * BLOCK):
        x = tl.load(x_ptr + start + offsets)
        total = tl.dot(x, x, total)
    tl.store(y_ptr + offsets, total)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_counts_reads_rereads_and_writes_under_the_mask(dtype):
    buffer = torch.ones(32, dtype=dtype)
    x, y = buffer[:11], torch.zeros(16, dtype=dtype)
    with count_accesses({"x": x, "rest": buffer[11:]}) as accesses:
        read_twice[(2,)](x, y_ptr=y, size=11, BLOCK=8, num_warps=4)
    size, (launch,) = dtype.itemsize, accesses.launches
    assert (launch.kernel, launch.grid) == ("read_twice", (2, 1, 1))
    assert launch.arguments == {
        "x_ptr": TensorBytes(11 * size, 22 * size, 0, 0, "x_ptr", (11,), dtype),
        "y_ptr": TensorBytes(0, 0, 11 * size, 11 * size, "y_ptr", (16,), dtype),
    }
    assert accesses.of("x")[0].total_read == 22 * size
    assert accesses.of("rest")[0].total_read == 0
    assert accesses.shaped(16) == [launch.arguments["y_ptr"]]
    assert launch.everything == Bytes(11 * size, 22 * size, 11 * size, 11 * size)
    assert launch.elsewhere == Bytes(0, 0, 0, 0)


def test_counts_what_is_out_of_bounds_elsewhere():
    buffer = torch.ones(16)
    with count_accesses() as accesses:
        read_twice[(1,)](buffer[:7], buffer[8:15], 8, BLOCK=8)
    assert accesses.launches[0].elsewhere == Bytes(4, 8, 4, 4)


def test_counts_only_the_elements_of_a_strided_view():
    x = torch.ones(3, 4)
    with count_accesses({"left": x[:, :1], "right": x[:, 1:], "none": x[:0]}) as accesses:
        read_twice[(2,)](x, torch.empty(3, 4), 12, BLOCK=8)
        read_twice[(1,)](x, x, 5, BLOCK=8)
    assert [tensor.read for tensor in accesses.of("left")] == [12, 8]
    assert [tensor.read for tensor in accesses.of("right")] == [36, 12]
    assert [tensor.written for tensor in accesses.of("right")] == [0, 12]
    assert [tensor.read for tensor in accesses.of("none")] == [0, 0]
    assert [tensor.written for tensor in accesses.shaped(3, 4)] == [0, 48, 20, 20]


def test_counts_atomics_as_a_read_and_a_write():
    with count_accesses() as accesses:
        tally[(3,)](torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    count, last = accesses.launches[0].arguments.values()
    assert (count.read, count.total_read, count.written, count.total_written) == (4, 12, 4, 12)
    assert (last.read, last.total_read, last.written, last.total_written) == (8, 24, 8, 24)


def interpreter() -> tuple[dict[str, Any], dict[str, Any]]:
    return dict(vars(InterpreterBuilder)), dict(vars(GridExecutor))


@pytest.mark.parametrize("tool", [count_accesses, lambda: shuffled_grid(0)])
def test_an_exception_leaves_the_interpreter_as_it_was(tool):
    def fail() -> None:
        with tool():
            assert interpreter() != before
            raise ZeroDivisionError

    before = interpreter()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert interpreter() == before


def visits(*grid: int) -> list[int]:
    visited = torch.full((24,), -1, dtype=torch.int32)
    visit[grid](torch.zeros(1, dtype=torch.int32), visited)
    return [program for program in visited.tolist() if program >= 0]


def test_shuffled_grid_runs_every_program_once_in_another_order():
    in_order = visits(4, 3, 2)
    with shuffled_grid(0), count_accesses(), count_accesses() as accesses:
        first, second = visits(4, 3, 2), visits(4, 3, 2)
        assert [visits(2) for _ in range(8)] == [[1, 0]] * 8
        assert visits(1) == [0]
    assert sorted(first) == sorted(second) == in_order == list(range(24))
    assert first != in_order != second != first
    assert len(accesses.launches) == 11
    with shuffled_grid(0):
        assert visits(4, 3, 2) == first


def test_shuffled_grid_exposes_a_race():
    in_order, shuffled = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    race[(2,)](torch.zeros(1, dtype=torch.int32), in_order)
    with shuffled_grid(0):
        race[(2,)](torch.zeros(1, dtype=torch.int32), shuffled)
    assert (in_order.tolist(), shuffled.tolist()) == ([1, 1], [1, 0])


def test_stand_in_driver_refuses_interpreted_kernels(interpreted):
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), stand_in_driver(90):
        pass


def test_stand_in_driver_compiles_for_each_gpu_and_resources_reads_the_code():
    compiled = without_interpreter(Path(__file__))
    assert list(compiled) == [str(capability) for capability in CAPABILITIES]
    for capability, (aligned, unaligned, spilling, tensor_core, again) in compiled.items():
        assert aligned | {"kernel": "read_twice", "grid": [4, 2, 1], "arch": int(capability)} == aligned
        assert aligned | {"loads": {"128": 2}, "stores": {"128": 2}, "async_copies": {}} == aligned
        assert aligned | {"stack": 0, "shared": 0, "tensor_core": 0} == aligned
        assert sum(aligned["opcodes"].values()) == aligned["instructions"] < unaligned["instructions"]
        assert unaligned | {"loads": {"32": 8}, "stores": {"128": 2}, "stack": 0} == unaligned
        assert min(spilling["stack"], spilling["opcodes"]["STL"], spilling["opcodes"]["LDL"]) > 0
        assert min(tensor_core["tensor_core"], tensor_core["shared"]) > 0
        assert (aligned["loops"], len(tensor_core["loops"]) > 0) == ([], True)
        assert all(0 < loop["instructions"] < tensor_core["instructions"] for loop in tensor_core["loops"])
        assert (list(tensor_core["async_copies"]), tensor_core["loads"]) == (["128"], {})
        assert again == tensor_core | {"grid": [5, 6, 7]}


def compile_toys(capability: int) -> list[Launch]:
    x, y = torch.zeros(2**14 + 4), torch.zeros(2**14)
    with stand_in_driver(capability) as launches:
        read_twice[4, 2](x, y, 4096, BLOCK=1024, enable_fp_fusion=True)
        read_twice[(4,)](x[1:], y, 4096, BLOCK=1024, enable_fp_fusion=True)
        divide_by_sum[(1,)](x, y, BLOCK=2**13, num_warps=1, enable_fp_fusion=True)
        kept = square[(1,)](x.half(), y, 2**14, BLOCK=64, enable_fp_fusion=True)
        kept[5, 6, 7](x.half(), y, 2**14, 64)
    with stand_in_driver(89), pytest.raises(RuntimeError, match=f"kept from sm_{capability}"):
        kept[1, 1, 1](x.half(), y, 2**14, 64)
    assert (driver._active, kept.module) == (None, None)
    return launches


def describe(launch: Launch) -> dict[str, Any]:
    about = {"kernel": launch.kernel, "grid": launch.grid, "arch": launch.compiled.metadata.target.arch}
    return asdict(resources(launch.compiled)) | about


if __name__ == "__main__":
    toys = {capability: compile_toys(capability) for capability in CAPABILITIES}
    print(json.dumps({capability: list(map(describe, launches)) for capability, launches in toys.items()}))


def test_instructions_per_element_are_those_of_the_loops_that_move_tiles():
    whole = {"elements": 8, "instructions": 240, "loops": [{"instructions": 50, "loads": {"32": 4}, "stores": {}}]}
    assert instructions_per_element(whole) == 30
    loops = [{"instructions": n, "loads": {"128": 2}, "stores": {"128": 1, "32": 1}} for n in (40, 56)]
    streamed = {**whole, "loops": [*whole["loops"], *loops]}
    assert instructions_per_element(streamed) == 12
    assert (wide_share(whole), wide_share(streamed)) == (None, 75)


def test_ops_log_lists_what_a_gpu_would_launch():
    x, y, host = torch.empty(2, 3, device="meta"), torch.empty(3, 2, device="meta"), torch.ones(2)
    with OpsLog() as log:
        torch.mm(x, y, out=torch.empty(2, 2, device="meta"))
        x.add_(1.0).t().copy_(y)
        torch.empty_like(x).view(6)
        host.add_(1.0)
    (mm, add, copy), f32 = log.ops, torch.float32
    assert (mm.reads, mm.writes) == ((((2, 3), f32), ((3, 2), f32)), (((2, 2), f32),))
    assert (add.name, add.reads, add.writes) == ("add_", (((2, 3), f32),), (((2, 3), f32),))
    assert (copy.name, copy.reads, copy.writes) == ("copy_", (((3, 2), f32),), (((3, 2), f32),))
    assert (log.accesses((2, 3), (3, 2)), log.accesses((2, 3), masks=True)) == (6, 0)


@pytest.mark.parametrize(("run", "interpreted"), [(in_interpreter, True), (without_interpreter, False)])
def test_a_script_runs_with_or_without_the_interpreter(run, interpreted, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, triton; print([int(triton.knobs.runtime.interpret), int(sys.argv[1])])")
    assert run(script, "7") == [interpreted, 7]


def test_memory_is_poisoned():
    """What the fixture of every test promises: nothing unwritten passes for a number."""
    for tensor in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(1).new_empty(3)):
        assert tensor.isnan().all()
    assert torch.equal(torch.empty(2, dtype=torch.int64), torch.tensor([-1, -1]))


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.item, bool, float, int, range, torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, str,
        torch.nonzero, torch.where, lambda x: x[x > 0], lambda x: torch.equal(x, x), lambda x: 1 in x,
        lambda x: x.to("cpu"), lambda x: x.to(device="cpu"), lambda x: torch.zeros(1).copy_(x),
    ],
)  # fmt: skip
def test_no_host_reads_tells_what_is_the_devices_from_what_is_the_hosts(read):
    device = torch.device("cpu")
    x, known = (torch.ones(1, dtype=torch.int64, device=device) for _ in range(2))
    with torch.device("cpu"), NoHostReads(known):
        x.copy_(torch.zeros_like(known))
        ours = torch.ones(1, dtype=torch.int64)
        for host in (known, ours + known, torch.full((1,), 2, device="cpu")):
            read(host[0] if read is range else host)
        for theirs in (x, ours * x, torch.ones(1, dtype=torch.int64, device=device), known.clone().to(device)):
            with pytest.raises(RuntimeError, match="on the host"):
                read(theirs[0] if read is range else theirs)
    read(x[0] if read is range else x)
