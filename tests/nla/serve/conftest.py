"""A pair, and a server of it, for all tests of `nla serve`; they are skipped, by name, where the extra is missing."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from nla.autoencoder import NLA

MISSING = [name for name in ("fastapi", "uvicorn", "prometheus_client", "httpx") if find_spec(name) is None]
collect_ignore_glob: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what is missing, on every test of this folder."""
    if MISSING:
        skip = pytest.mark.skip(reason=f"{', '.join(MISSING)} not installed: pip install 'nla[serve]'")
        for item in items:
            if item.path.parent.name == "serve":
                item.add_marker(skip)


@pytest.fixture(scope="session")
def couplets() -> NLA:
    """The embedded pair. Tests may call it directly while the server of :func:`client` does not work."""
    return NLA.from_pretrained("couplets", device="cpu")


@pytest.fixture(scope="session")
def client(couplets: NLA) -> Iterator[Any]:
    """A client of a server of Couplets."""
    from starlette.testclient import TestClient  # pyright: ignore[reportMissingImports]

    from nla.serve.app import make_app
    from nla.serve.engine import Engine

    app = make_app(Engine({"couplets": couplets}))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client
