"""Runs scripts in processes of their own: whether Triton interprets or compiles is decided when it is imported."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# What pyproject.toml lets pass in tests, too: numpy's remarks on NaN and overflow, and on how Triton 3.6 reads bounds.
REMARKS = ("overflow", "invalid value", "divide by zero", "underflow")
INTERPRETER_WARNINGS = [f"{remark} encountered:RuntimeWarning:triton.runtime.interpreter" for remark in REMARKS]
INTERPRETER_WARNINGS.append("Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def without_interpreter(script: Path, *arguments: str) -> Any:
    """Runs a script in a process where kernels compile; returns the JSON it prints. Warnings are errors."""
    return _json_of(script, arguments, {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"})


def in_interpreter(script: Path, *arguments: str) -> Any:
    """The same where Triton interprets kernels, on CPU tensors; skips what calls it where that cannot be."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("Triton 3.6's interpreter does not run with numpy 2.4 or newer")
    return _json_of(script, arguments, os.environ | {"TRITON_INTERPRET": "1", "FASTNN_TEST_DEVICE": "cpu"})


def _json_of(script: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> Any:
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-W", "error"]
    for message in INTERPRETER_WARNINGS:
        command += ["-W", f"ignore:{message}"]
    command += [str(script), *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
