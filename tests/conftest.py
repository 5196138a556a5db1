"""Fixtures: tiny random models, a tokenizer and a pair."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from nla.autoencoder import NLA
from tests.helpers.shell import Shell
from tests.helpers.tiny import ARCHITECTURES, MODELS, TEXTS, make_model, make_pair, make_tokenizer


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--reference FOLDER``: clones of other projects, to run their code beside ours."""
    parser.addoption("--reference", default=None)


def pytest_collection_finish() -> None:
    """Collecting garbage, as every run of a trainer does, takes a second with all that the imports have left in memory:
    what is there before the first test is not looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models are fastest on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest):
    """A tiny random model of the architectures that most tests run on."""
    return make_model(request.param)


@pytest.fixture(params=MODELS)
def any_model(request: pytest.FixtureRequest):
    """A tiny random model of each architecture."""
    return make_model(request.param)


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer with a chat template and a single-token marker."""
    return make_tokenizer()


@pytest.fixture
def pair() -> NLA:
    """A fresh pair on a tiny Qwen2 with random adapters."""
    return make_pair()


@pytest.fixture
def texts() -> list[str]:
    """Documents of different lengths, all within the tokenizer's vocabulary."""
    return list(TEXTS)


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    """Runs commands as a user types them; see its module for how it saves the seconds of imports."""
    shell = Shell()
    yield shell
    shell.close()
