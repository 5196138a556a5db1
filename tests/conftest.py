"""Fixtures: tiny random models, a tokenizer and a pair.

PyTorch is imported by the tests and inside the fixtures: the process that only hands out tests starts at once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.helpers.shell import Shell

if TYPE_CHECKING:
    from nla.autoencoder import NLA


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--reference FOLDER``: clones of other projects, to run their code beside ours."""
    parser.addoption("--reference", default=None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``model`` is of the architectures that most tests run on, ``any_model`` of each."""
    if {"model", "any_model"} & set(metafunc.fixturenames):
        from tests.helpers.tiny import ARCHITECTURES, MODELS

        for name, architectures in (("model", ARCHITECTURES), ("any_model", MODELS)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, list(architectures), indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the shell are slow: its server takes seconds to start. Each of two processes begins with half of the
    slow tests, so that what is left at the end is short."""
    for item in items:
        if "shell" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    if hasattr(config, "workerinput"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        fast = [item for item in items if not item.get_closest_marker("slow")]
        half = len(slow) // 2
        n_first = len(items) // 2 - half
        items[:] = slow[:half] + fast[:n_first] + slow[half:] + fast[n_first:]


def pytest_collection_finish() -> None:
    """Collecting garbage, as every run of a trainer does, takes a second with all that the imports have left in memory:
    what is there before the first test is not looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models are fastest on one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def model(request: pytest.FixtureRequest):
    """A tiny random model of the architectures that most tests run on."""
    from tests.helpers.tiny import make_model

    return make_model(request.param)


@pytest.fixture
def any_model(request: pytest.FixtureRequest):
    """A tiny random model of each architecture."""
    from tests.helpers.tiny import make_model

    return make_model(request.param)


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer with a chat template and a single-token marker."""
    from tests.helpers.tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def pair() -> NLA:
    """A fresh pair on a tiny Qwen2 with random adapters."""
    from tests.helpers.tiny import make_pair

    return make_pair()


@pytest.fixture
def texts() -> list[str]:
    """Documents of different lengths, all within the tokenizer's vocabulary."""
    from tests.helpers.tiny import TEXTS

    return list(TEXTS)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of the real model; tests of it are skipped, by this name, where its package is not installed."""
    from nla.errors import MissingExtraError
    from nla.organisms import target_folder

    try:
        target_folder("smollm2")
    except MissingExtraError as error:
        pytest.skip(f"smollm2: {error}")
    return "smollm2"


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    """Runs commands as a user types them; see its module for how it saves the seconds of imports."""
    shell = Shell()
    yield shell
    shell.close()
