"""What is shipped works as the README says: its five lines, its organisms, its demo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nla.config import tokenizer_hash
from nla.organisms import couplets
from nla.organisms.couplets import tokenizer
from nla.text.tokens import load_tokenizer

README = Path(__file__).parents[3] / "README.md"


def test_the_readmes_five_lines_run_and_reconstruct(capsys: pytest.CaptureFixture[str]) -> None:
    snippet = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert snippet is not None and "from_pretrained" in snippet[1]
    exec(snippet[1], {})
    fve = re.search(r"^fve +(-?\d\.\d+) \(one document", capsys.readouterr().out, re.MULTILINE)
    assert fve is not None and float(fve[1]) > 0.3


@pytest.mark.parametrize("folder", [couplets.PLANNER, couplets.PLAIN], ids=lambda folder: folder.name)
def test_the_shipped_tokenizers_are_the_ones_that_the_code_builds(folder: Path) -> None:
    assert tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(tokenizer.build())


@pytest.mark.slow
def test_the_demo_finds_causal_items_in_little_memory() -> None:
    """The installed command in a process of its own, whose peak memory is the demo's."""
    command = [str(Path(sys.executable).parent / "nla"), "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["peak_memory_gb"] < 3
    assert sum(found["gate"].values()) == 32
    assert found["gate"]["causal"] >= 16
    audit, compared = found["audit"], found["compare"]
    assert audit["found: plant"]["low"] > max(audit["found: sham"]["high"], audit["found: base"]["high"])
    assert "honey" in " ".join(audit["example"]["explanations"]) and audit["example"]["chat"][-1]["role"] == "assistant"
    named, shuffled = (compared[name]["without"] for name in ("NLA", "shuffled-activation NLA"))
    assert named["low"] > shuffled["high"] and compared["text-only LM"]["with labels"]["value"] == 0.5
