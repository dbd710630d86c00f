"""The examples' main in this process and a folder of its own: each process would take 5 s, all of it imports."""

import sys

import pytest
from support.examples import ROOT

from fastnn import dispatch


@pytest.fixture(autouse=True)
def as_a_user(on_host):
    """Who sets no default device."""


@pytest.fixture
def take_path(monkeypatch):
    """take_path(interpreted): CPU tensors go to the kernels in Triton's interpreter, or take torch's own ops."""

    def take(interpreted):
        if interpreted and not dispatch.INTERPRETED:
            pytest.skip("the kernels take CPU tensors in Triton's interpreter only: FASTNN_TEST_DEVICE=cpu")
        monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)

    return take


@pytest.fixture
def eager(take_path):
    """The path of a user's CPU: torch's own ops."""
    take_path(False)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(module, *arguments): exit code, what was printed, and lines of the standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def called(module, *arguments):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "examples" / f"{module.__name__}.py"), *arguments])
        code = 0
        try:
            module.main()
        except SystemExit as exited:
            code = exited.code
        output, error = capsys.readouterr()
        return code, output, error.splitlines()

    return called
