"""What the examples run in as processes: as for a user, any warning an error."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Of a user who has installed this checkout, and whose `python` is the one that runs the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    settings = {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "MPLBACKEND": "Agg", "PYTHONWARNINGS": "error"}
    return os.environ | settings | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}  # as many processes as cores
