"""Every architecture against transformers itself: reading, loading and injecting are exact on each."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nla.autoencoder import NLA
from nla.errors import ArchitectureError
from nla.models.generate import generate
from nla.models.hooks import inject, replace
from nla.models.load import load_target, load_truncated
from nla.models.points import TESTED, blocks, context_length, d_model, final_norm, linear_names, truncated_view
from nla.models.read import padded, read
from tests.helpers.tiny import (
    CONTEXT,
    D_MODEL,
    MODELS,
    N_BLOCKS,
    TEXTS,
    make_config,
    make_model,
    make_pair,
    make_tokenizer,
)

POINTS = [f"resid_post.{layer}" for layer in range(N_BLOCKS)]
IDS = torch.tensor([[11, 33, 37, 40, 12, 20, 21, 30, 31, 33]])


@torch.no_grad()
def oracle(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """What transformers says each block gives; the last one's as its final norm receives it."""
    kept = []
    norm = model.get_submodule(MODELS[name_of(model)][1])
    handle = norm.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    hidden = model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    return [*hidden[1:N_BLOCKS], kept[0]]


def name_of(model: nn.Module) -> str:
    return model.config.model_type  # type: ignore[union-attr,return-value]


def vectors_of(n: int) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(1))


def test_every_architecture_that_is_known_is_tested() -> None:
    assert set(MODELS) == TESTED


def test_reading_a_padded_batch_gives_what_transformers_gives_each_text_alone(any_model) -> None:
    tokenizer = make_tokenizer()
    alone = [oracle(any_model, torch.tensor([tokenizer(text)["input_ids"]])) for text in TEXTS]
    for layer, point in enumerate(POINTS):
        found = read(any_model, tokenizer, TEXTS, point).vectors
        expected = torch.cat([hidden[layer][0] for hidden in alone])
        assert ((found - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()
        assert not torch.allclose(expected, torch.cat([hidden[layer - 1][0] for hidden in alone]), atol=1e-2)


def test_reading_in_bf16_gives_the_bits_of_transformers_in_bf16(any_model) -> None:
    model, tokenizer = any_model.bfloat16(), make_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = oracle(model, padded(rows))
    for layer, point in enumerate(POINTS):
        found = read(model, tokenizer, TEXTS, point).vectors
        whole = torch.cat([expected[layer][number, : len(row)] for number, row in enumerate(rows)])
        assert torch.equal(found, whole.float())


def test_the_view_is_a_view_and_leaves_the_target_as_it_was(any_model) -> None:
    before, modules = any_model(IDS).logits, {name: id(module) for name, module in any_model.named_modules()}
    config = any_model.config.to_dict()
    view = truncated_view(any_model, "resid_post.1")
    view(input_ids=IDS, output_hidden_states=True)
    whole = {id(parameter) for parameter in any_model.parameters()}
    assert {id(parameter) for parameter in view.parameters()} < whole
    assert not [name for name, _ in view.named_parameters() if "vision" in name or ".2." in name or ".3." in name]
    assert torch.equal(any_model(IDS).logits, before) and any_model.config.to_dict() == config
    assert {name: id(module) for name, module in any_model.named_modules()} == modules
    assert len(any_model(IDS, output_hidden_states=True).hidden_states) == N_BLOCKS + 1


def test_sizes_and_the_final_norm_are_those_of_the_model(any_model) -> None:
    assert (context_length(any_model), d_model(any_model)) == (CONTEXT, D_MODEL)
    assert final_norm(any_model) is any_model.get_submodule(MODELS[name_of(any_model)][1])


def test_the_target_and_its_first_blocks_load_from_disk_as_they_were_saved(any_model, tmp_path: Path) -> None:
    any_model.save_pretrained(tmp_path, max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_target(tmp_path, device="cpu")
    assert torch.equal(loaded(IDS).logits, any_model(IDS).logits)
    assert not [name for name, _ in loaded.named_parameters() if "vision" in name]
    for layer, point in ((0, POINTS[0]), (2, POINTS[2]), (3, POINTS[3])):
        view = load_truncated(tmp_path, point, device="cpu")
        assert torch.equal(view(input_ids=IDS, use_cache=False).last_hidden_state, oracle(any_model, IDS)[layer])
        ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (view, truncated_view(any_model, point)))
        assert ours == theirs


def test_injection_overwrites_one_row_of_what_the_embeddings_give(any_model) -> None:
    """Gemma scales its embeddings by √d; a vector that takes the place of one is not, as ``inputs_embeds`` are not."""
    embeddings, vector, kept = any_model.get_input_embeddings(), 5 * vectors_of(1), []
    with torch.no_grad():
        plain = embeddings(IDS)
        expected = plain.clone()
        expected[0, 3] = vector[0]
        logits = any_model(inputs_embeds=expected).logits
        with inject(any_model, vector, torch.tensor([3])):
            handle = embeddings.register_forward_hook(lambda module, args, output: kept.append(output))
            found = any_model(IDS).logits
            handle.remove()
    assert torch.equal(kept[0], expected) and torch.equal(found, logits)
    assert not torch.allclose(logits, any_model(IDS).logits, atol=1e-2)


@torch.no_grad()
def test_generation_sees_the_injected_vector(any_model) -> None:
    """Against the likeliest tokens, found one by one without a cache from embeddings in which the vector stands."""
    vectors, settings = 5 * vectors_of(4), dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = IDS.expand(4, -1)
    with inject(any_model, vectors, torch.full((4,), 3)):
        found = any_model.generate(ids, **settings)
    for _ in range(6):
        embedded = any_model.get_input_embeddings()(ids).clone()
        embedded[:, 3] = vectors
        ids = torch.cat([ids, any_model(inputs_embeds=embedded).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids) and len(found.unique(dim=0)) > 1


@pytest.mark.parametrize("architecture", MODELS)
def test_a_pair_explains_reconstructs_and_switches_roles(architecture: str) -> None:
    pair, base = make_pair(architecture, scale=0.3), make_model(architecture)
    acts = pair.read(TEXTS[:2], positions="last")
    notes = pair.explain(acts, samples=2)
    assert pair.reconstruct(notes).shape == acts.vectors.shape and len(notes.texts[0]) == 2
    with torch.no_grad():
        with pair.role("target"):
            assert torch.equal(pair.model(IDS).logits, base(IDS).logits)
        logits = {}
        for role in ("encoder", "decoder"):
            with pair.role(role):
                logits[role] = pair.model(IDS).logits
                assert all(role == "encoder" or p.grad is None for p in pair.model.parameters())
    assert not torch.allclose(logits["encoder"], base(IDS).logits, atol=1e-3)
    assert not torch.allclose(logits["encoder"], logits["decoder"], atol=1e-3)
    adapted = {name for name, _ in pair.model.named_parameters() if ".lora_A." in name}
    n_linears = sum(isinstance(module, nn.Linear | Conv1D) for module in blocks(base)[0].modules())
    assert len(adapted) == n_linears * (N_BLOCKS + 2) and not [name for name in adapted if "vision" in name]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "qwen3_moe"])
def test_a_pair_comes_back_from_disk_as_it_was(architecture: str, tmp_path: Path) -> None:
    """Where names or layers differ from Llama's: a wrapper, fused layers, Conv1D, other paths, fused experts."""
    make_model(architecture).save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    model, tokenizer = load_target(tmp_path / "target", device="cpu")
    pair = NLA.create(model, tokenizer, make_config(tokenizer, model, target=str(tmp_path / "target")), rank=2)
    with torch.no_grad():
        for name, parameter in pair.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    pair.save_pretrained(tmp_path / "pair")
    again, acts = NLA.from_pretrained(tmp_path / "pair", device="cpu"), pair.read(TEXTS)
    assert torch.equal(again.read(TEXTS).vectors, acts.vectors)
    notes = pair.explain(acts[:3], samples=2)
    assert again.explain(acts[:3], samples=2).texts == notes.texts
    assert torch.equal(again.reconstruct(notes), pair.reconstruct(notes))


def test_another_architecture_is_refused_with_what_to_do() -> None:
    with pytest.raises(ArchitectureError, match=r"Linear.*qwen2"):
        linear_names(nn.Linear(2, 2))


def test_an_intervention_on_the_prompt_acts_once_while_answers_are_written_through_a_cache(any_model) -> None:
    prompt, vector, column = IDS[0, :6].tolist(), 8 * vectors_of(1), torch.tensor([1])
    written = generate(
        any_model,
        [prompt],
        ends=[],
        pad=0,
        max_new_tokens=4,
        intervene=lambda rows, padding: replace(any_model, POINTS[1], column + padding, vector),
    )
    ids = list(prompt)
    for _ in range(4):  # without a cache: the whole row again for each token
        with torch.no_grad(), replace(any_model, POINTS[1], column, vector):
            ids.append(int(any_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert written.rows() == [ids[len(prompt) :]]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_peft_has_nothing_to_warn_of_in_a_pair(architecture: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        make_pair(architecture)
