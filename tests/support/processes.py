"""Runs scripts in processes of their own: whether Triton interprets or compiles is decided when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# What pyproject.toml lets pass in tests, too: the interpreter computes with numpy, which remarks on NaN and overflow.
INTERPRETER_WARNINGS = ("overflow", "invalid value", "divide by zero", "underflow")


def without_interpreter(script: Path, *arguments: str) -> Any:
    """Runs a script in a process where kernels compile; returns the JSON it prints. Warnings are errors."""
    return _json_of(script, arguments, {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"})


def in_interpreter(script: Path, *arguments: str) -> Any:
    """The same where Triton interprets kernels, on CPU tensors."""
    return _json_of(script, arguments, os.environ | {"TRITON_INTERPRET": "1", "FASTNN_TEST_DEVICE": "cpu"})


def _json_of(script: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> Any:
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-W", "error"]
    for message in INTERPRETER_WARNINGS:
        command += ["-W", f"ignore:{message} encountered:RuntimeWarning:triton.runtime.interpreter"]
    command += [str(script), *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
