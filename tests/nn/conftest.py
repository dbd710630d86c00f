"""The paths that a module's tests take."""

import pytest
from support.sequential_pair import TOLERANCES

from fastnn import dispatch


@pytest.fixture(params=TOLERANCES)
def path(request, monkeypatch):
    """The kernels, and both ways to plain torch ops."""
    if request.param == "reference":
        monkeypatch.setattr(dispatch, "HAS_KERNELS", False)
    return request.param
