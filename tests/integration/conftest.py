"""The paths on which models train under other libraries."""

import pytest
from support.digits import SETTINGS

from fastnn import dispatch


@pytest.fixture(params=SETTINGS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU's without Triton's interpreter, and the kernels'."""
    if request.param == "eager":
        monkeypatch.setattr(dispatch, "device_path", lambda device: dispatch.Path("eager", "for the test"))
    return request.param
