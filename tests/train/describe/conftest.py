"""What the tests of describers share."""

from __future__ import annotations

import pytest

from tests.helpers.endpoint_server import FORMS


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """Each form of endpoint."""
    return request.param
