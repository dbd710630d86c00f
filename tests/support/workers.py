"""Processes of torch.distributed (gloo) that call functions of a module by name, with kernels in the interpreter."""

import contextlib
import gc
import importlib
import multiprocessing
import pickle
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Read when triton, support and torch are imported, there: on a machine with a GPU these are processes without one.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "FASTNN_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
SECONDS = 90  # until processes that do not answer are ended


def serve(module: str, rank: int, processes: int, rendezvous: str, connection: Connection) -> None:
    """Joins the other processes, then calls functions of the module until it is told to stop (None).

    Answers are (whether it went well, result or traceback), pickled here: torch's own way of sending would share
    memory that dies with this process.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    warnings.filterwarnings("error", module="fastnn")
    functions = vars(importlib.import_module(module))
    timeout = timedelta(seconds=40)
    dist.init_process_group("gloo", init_method=rendezvous, timeout=timeout, world_size=processes, rank=rank)
    while (request := connection.recv()) is not None:
        function, args = request
        try:
            answer = True, functions[function](*args)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
        gc.collect()
    dist.destroy_process_group()


class Workers:
    """All processes are ended when one of them fails or does not answer, and started anew by the next call."""

    def __init__(self, folder: Path, module: str, processes: int) -> None:
        self.folder, self.module, self.count, self.starts = folder, module, processes, 0
        self.processes: list = []
        self.connections: list = []

    def start(self) -> None:
        self.starts += 1
        rendezvous = (self.folder / f"rendezvous{self.starts}").as_uri()
        context = multiprocessing.get_context("spawn")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            for rank in range(self.count):
                ours, theirs = context.Pipe()
                args = self.module, rank, self.count, rendezvous, theirs
                process = context.Process(target=serve, args=args, daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self.connections.append(ours)

    def __call__(self, function: str, *args: Any) -> list[Any]:
        """The results of a function of the module, by rank."""
        if not all(process.is_alive() for process in self.processes):
            self.stop(force=True)
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send((function, args))
        answers: dict[Any, Any] = {}
        end = time.monotonic() + SECONDS
        while len(answers) < len(self.connections):
            left = [c for c in self.connections if c not in answers]
            ready: list[Any] = wait(left, max(0.0, end - time.monotonic()))
            for connection in ready:
                try:
                    went_well, answers[connection] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    went_well, answers[connection] = False, "the process is gone"
                if not went_well:
                    end = min(end, time.monotonic() + 2)  # the other may say why, or wait in vain
                    answers[connection] = RuntimeError(answers[connection])
            if not ready:
                break
        failures = [str(a) for a in answers.values() if isinstance(a, RuntimeError)]
        if len(answers) < len(self.connections):
            failures.append(f"{len(answers)} of {len(self.connections)} processes have answered to {function}")
        if failures:
            self.stop(force=True)
            pytest.fail("\n".join(failures), pytrace=False)
        return [answers[connection] for connection in self.connections]

    def stop(self, force: bool = False) -> None:
        for process, connection in zip(self.processes, self.connections, strict=True):
            if force:
                process.kill()
            else:
                with contextlib.suppress(OSError):  # gone already
                    connection.send(None)
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
            connection.close()
        self.processes, self.connections = [], []
