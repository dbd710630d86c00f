"""Which kernels a program launches, in Triton's interpreter or on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import triton
from triton.runtime.interpreter import GridExecutor


@contextmanager
def kernels_launched() -> Iterator[list[str]]:
    """The names of those launched within, in order."""
    names: list[str] = []
    if not triton.knobs.runtime.interpret:
        hook = triton.knobs.runtime.launch_enter_hook

        def enter(metadata: Any) -> None:
            names.append(metadata.get()["name"])

        hook.add(enter)
        try:
            yield names
        finally:
            hook.remove(enter)
        return
    execute = GridExecutor.__call__

    def named(executor: Any, *args: Any, **kwargs: Any) -> None:
        names.append(executor.fn.__name__)
        execute(executor, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", named):
        yield names
