"""SmolLM2 itself, where its package is installed: it answers, and is read as transformers has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nla.autoencoder import NLA
from nla.config import NLAConfig
from nla.eval.target import Target, continued
from nla.models import selfcheck
from nla.models.load import fastest_dtype, load_target
from nla.models.points import Point, blocks
from nla.models.read import read
from nla.organisms import hash_target
from nla.text.tokens import render_prompt
from nla.train.pair_config import DECODER_TEMPLATE, ENCODER_PROMPT, Prompts, pair_config
from nla.train.recipe import SHIPPED
from tests.helpers.shell import Shell

TEXTS = [
    "The capital of France is Paris, and it lies on the Seine.",
    "def add(a, b):\n    return a + b\n",
    "Die Katze saß auf der Matte. She said: “It's raining again!”",
]
POINTS = (0, 14, 29)


@pytest.fixture(scope="module")
def loaded(smollm2: str) -> dict[str, tuple[Any, Any]]:
    """The model and its tokenizer in both types."""
    return {dtype: load_target(smollm2, dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_knows_the_capital_of_france(loaded: dict[str, tuple[Any, Any]], dtype: str) -> None:
    model, tokenizer = loaded[dtype]
    target = Target(model, tokenizer, Point.parse("resid_post.0"))
    prompt = render_prompt(tokenizer, "What is the capital of France?")
    written = continued(target, [prompt], 20)
    answer = tokenizer.decode(written.ids[0, : written.lengths[0]])
    assert "Paris" in answer and bool(written.ended[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_an_activation_is_transformers_own_hidden_state(
    loaded: dict[str, tuple[Any, Any]], dtype: str, tolerance: float
) -> None:
    model, tokenizer = loaded[dtype]
    with torch.no_grad():
        states = []
        for text in TEXTS:
            kept: list[torch.Tensor] = []
            # transformers puts the final norm on the last of its hidden states: what block 29 returns is hooked
            handle = blocks(model)[29].register_forward_hook(lambda *a, kept=kept: kept.append(a[2]))
            ids = tokenizer(text, return_tensors="pt").input_ids
            out = model(ids, output_hidden_states=True)
            handle.remove()
            last = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
            states.append([out.hidden_states[1][0], out.hidden_states[15][0], last.reshape(ids.shape[1], -1)])
    for i, layer in enumerate(POINTS):
        expected = torch.cat([rows[i] for rows in states]).float()
        found = read(model, tokenizer, TEXTS, f"resid_post.{layer}").vectors
        assert found.shape == expected.shape
        assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < tolerance


def test_bfloat16_is_near_float32_and_not_equal(loaded: dict[str, tuple[Any, Any]]) -> None:
    (wide, tokenizer), (narrow, _) = loaded["float32"], loaded["bfloat16"]
    ids = tokenizer("\n".join(TEXTS), return_tensors="pt").input_ids
    with torch.no_grad():
        p, q = (model(ids).logits[0].float().log_softmax(-1) for model in (wide, narrow))
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.02  # nats


def test_its_residual_stream_passes_the_check_of_unknown_architectures(
    loaded: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "TESTED", {})
    for model, _ in loaded.values():
        selfcheck.check_stream(model)
        assert selfcheck.backbone(model) in selfcheck._PASSED


def test_a_pair_on_it_is_saved_with_its_name_alone_and_loads_elsewhere(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_target(smollm2, device="cpu")
    prompts = Prompts(ENCODER_PROMPT, DECODER_TEMPLATE)
    config = pair_config(
        smollm2,
        None,
        tokenizer,
        "resid_post.2",
        prompts,
        d_model=576,
        dtype=fastest_dtype(smollm2, "cpu"),
        quantization=None,
        max_new_tokens=4,
        activation_norm=100.0,
        injection_norm=None,
        head_bias=True,
    )
    NLA.create(model, tokenizer, config, rank=1).save_pretrained(tmp_path / "pair")
    saved = NLAConfig.load(tmp_path / "pair")
    assert (saved.target, saved.target_weights) == (smollm2, hash_target(smollm2))
    (tmp_path / smollm2).mkdir()
    monkeypatch.chdir(tmp_path)
    pair = NLA.from_pretrained("pair", device="cpu")
    explanations = pair.explain(pair.read("The capital of France is", "last"), samples=1)
    assert len(explanations) == 1 and -1 <= explanations[0].cosine[0] <= 1
    assert {p.dtype for name, p in pair.model.named_parameters() if "lora_" in name} == {torch.float32}


def test_a_recipe_for_it_is_written_and_accepted(smollm2: str, shell: Shell, tmp_path: Path) -> None:
    written = shell.run("nla recipe smollm2", tmp_path)
    assert written.code == 0 and written.stdout == (SHIPPED / "smollm2.yaml").read_text()
    assert json.loads(shell.run("nla recipe smollm2 --json", tmp_path).stdout)["corpus"]["source"] == "self"
    assert shell.run("nla recipe smollm2 --revision v2", tmp_path).code == 2
    (tmp_path / "my.yaml").write_text(written.stdout)
    planned = shell.run("nla train my.yaml --dry-run", tmp_path)
    assert planned.code == 0 and "would run" in planned.stdout
    assert not (tmp_path / "runs").exists()
