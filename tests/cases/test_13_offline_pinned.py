"""Case 13: without a network, a target at a pinned commit is read from the cache; one that is not there is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.targets import saved

PINNED, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
CODE = """
import sys
from nla.errors import NLAError
from nla.models.load import load_target
try:
    model, tokenizer = load_target("lab/tiny-chat", revision=sys.argv[1], device="cpu")
    print("read", model.config._commit_hash)
except NLAError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_pinned_target_is_read_from_the_cache_and_another_commit_is_named(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--lab--tiny-chat" / "snapshots" / PINNED
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(saved(tmp_path / "target"), snapshot)
    place = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def ran(revision: str) -> str:
        command = [sys.executable, "-c", CODE, revision]
        done = subprocess.run(command, env=os.environ | place, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    assert ran(PINNED).strip() == f"read {PINNED}"
    refused = ran(OTHER)
    assert refused.startswith("TargetError") and "lab/tiny-chat" in refused and OTHER in refused
