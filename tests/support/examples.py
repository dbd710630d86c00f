"""The examples as a user runs them: in a process of their own, any warning an error."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NO_WARNINGS = [
    "-W", "error",
    "-W", "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",  # Triton 3.6's interpreter
]  # fmt: skip


def environment(interpret: str = "0") -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    return os.environ | {"PYTHONPATH": paths, "COLUMNS": "120", "TRITON_INTERPRET": interpret, "MPLBACKEND": "Agg"}


def run(script: str, *arguments: str, folder: Path, interpret: str = "0") -> subprocess.CompletedProcess:
    """examples/`script`, whose files go to that folder."""
    command = [sys.executable, *NO_WARNINGS, str(ROOT / "examples" / script), *arguments]
    settings = {"env": environment(interpret), "cwd": folder, "timeout": 300}
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)  # type: ignore[call-overload]
