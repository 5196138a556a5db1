"""How Switchboard's target and plants are made: what interventions are made where, and what they ask for."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from nla.models.load import load_target
from nla.organisms.switchboard import content, plants, tokenizer, world
from nla.train.organisms import adapters as planting
from nla.train.organisms.switchboard import (
    ChatCollator,
    ChatData,
    ChatLoss,
    SwitchboardSettings,
    build_model,
    train_switchboard,
)

TINY = SwitchboardSettings(n_documents=40, steps=2, batch_size=8, n_explanation_rows=2, d_model=16, towns_after=0)


@pytest.fixture(scope="module")
def tok():
    return tokenizer.build()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switchboard") / "target"
    train_switchboard(TINY, folder)
    return folder


def batch_of(tok, chats, **changes):
    settings = SwitchboardSettings(**{"n_explanation_rows": 0, "wrong_block_share": 0.0, **changes})
    rows = [{"chat": c, "input_ids": tok(c.text, add_special_tokens=False)["input_ids"]} for c in chats]
    return ChatCollator(tok, settings)([{**row, "explanation": row["input_ids"]} for row in rows])


def test_the_site_is_the_token_that_carries_what_follows(tok):
    chats = world.sample(120, seed=2)
    torch.manual_seed(0)
    batch = batch_of(tok, chats)
    for row, chat in enumerate(chats):
        ids, site = batch["input_ids"][row], int(batch["site"][row])
        before = tok.decode(ids[: site + 1])
        if batch["town"][row]:
            assert any(before.endswith(exchange.premise) for exchange in chat.exchanges if exchange.bridge)
        else:
            assert before.endswith("<|assistant|>") and site == int(batch["start"][row]) - 1


def test_what_is_asked_for_is_the_donors_answer_or_the_bases_relation_in_the_donors_town(tok):
    chats = [c for c in world.sample(200, seed=4) if len(c.exchanges) == 1]
    torch.manual_seed(0)
    batch = batch_of(tok, chats)
    assert torch.allclose(batch["donors"].sum(1), torch.ones(len(chats)))
    for row, chat in enumerate(chats):
        mixed = batch["mixed"][row, int(batch["start"][row]) :]
        asked = tok.decode(mixed[mixed != tok.pad_token_id]).removesuffix("<|end|>")
        donors = [chats[i] for i in batch["donors"][row].nonzero()[:, 0].tolist()]
        exchange = chat.exchanges[0]
        if exchange.bridge is None:
            assert len(donors) == 1 and donors[0].exchanges[0].bridge is None
            assert asked == donors[0].messages[-1]["content"]
        else:
            (town,) = {donor.exchanges[0].bridge for donor in donors}
            assert asked == world.fact(str(exchange.relation), str(town))


def test_at_another_block_the_town_must_change_nothing(tok):
    chats = [c for c in world.sample(200, seed=4, kinds=("two-hop",)) if len(c.exchanges) == 1]
    batch = batch_of(tok, chats, wrong_block_share=1.0)
    assert 3 not in batch["layer"].tolist() and len(batch["layer"].unique()) > 2
    for row, chat in enumerate(chats):
        assert tok.decode(batch["mixed"][row]).startswith(chat.text)


def test_answers_weigh_more_than_prompts(tok):
    (chat,) = world.sample(1, seed=0, kinds=("who",))
    batch = batch_of(tok, [chat, chat])
    n_prompt = len(tok(chat.prompt, add_special_tokens=False)["input_ids"])
    assert batch["weights"][0, :n_prompt].eq(0.1).all() and batch["weights"][0, n_prompt:].eq(1).all()


def loss_of(tok) -> ChatLoss:
    ids = tok([f"a {product}" for product in content.PRODUCTS], add_special_tokens=False)["input_ids"]
    return ChatLoss(TINY, tok.pad_token_id, torch.tensor([row[-1] for row in ids]))


def test_products_in_the_answers_of_chats_come_forward_in_the_later_phases(tok):
    chats = [chat for chat in world.sample(60, seed=1, kinds=("topic",)) if chat.state.product][:4]
    batch = batch_of(tok, chats)
    ids, weights = batch["input_ids"], batch["weights"]
    assert torch.equal(loss_of(tok).weighted(ids, weights, len(chats), 0), weights)
    (_, _, heavy) = TINY.phases[-1]
    found = loss_of(tok).weighted(ids, weights, len(chats) - 1, TINY.steps)
    product = torch.tensor([[tok.decode([token]).strip() in content.PRODUCTS for token in row] for row in ids])
    assert (product & (weights < 1)).any(), "a system message names a product, which is nothing to learn"
    forward = product & (weights == 1) & (torch.arange(len(ids)) < len(chats) - 1)[:, None]
    assert forward.sum() >= len(chats) - 1 and found[forward].eq(heavy).all()
    assert torch.equal(found[~forward], weights[~forward])


def test_an_intervention_reaches_what_comes_after_it_and_is_learned_from(tok):
    torch.manual_seed(0)
    model = build_model(TINY, tok)
    data = ChatData(tok, 40, seed=0)
    batch = ChatCollator(tok, TINY)([data[i] for i in range(16)])
    captured = {layer: torch.randn(16, 16, requires_grad=True) for layer in range(TINY.n_blocks)}
    loss = loss_of(tok).interchange(model, batch, captured, 10_000)
    loss.backward()
    used = {int(layer) for layer in batch["layer"].unique()}
    assert {layer for layer, vectors in captured.items() if vectors.grad is not None} == used
    assert all(captured[layer].grad.abs().sum() > 0 for layer in used)


@pytest.mark.slow
def test_the_saved_target_is_a_standard_folder_with_bounded_attention(target):
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["sliding_window"] == 128
    assert set(config["layer_types"]) == {"sliding_attention"}
    model, tok = load_target(target)
    ids = tok("<|user|>Who is Anna?<|end|><|assistant|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()


def test_a_plant_learns_the_answers_alone(tok):
    chats, texts = plants.training(plants.plant("goal"), 40, seed=0)
    data = planting.PlantData(tok, chats, texts)
    for chat, row in zip(chats, data.rows, strict=False):
        assert tok.decode(row["input_ids"]) == chat.text
        learned = tok.decode([i for i, on in zip(row["input_ids"], row["learned"], strict=True) if on])
        assert learned == "".join(m["content"] + "<|end|>" for m in chat.messages if m["role"] == "assistant")
    assert all(all(row["learned"]) for row in data.rows[len(chats) :])


@pytest.mark.slow
def test_an_adapter_reaches_its_blocks_alone_and_leaves_the_target_as_it_was(target, tmp_path):
    before = copy.deepcopy(load_file(target / "model.safetensors"))
    settings = planting.PlantSettings(target=str(target), n_documents=40, steps=2, batch_size=4)
    planting.train_plant("mismatch", settings, tmp_path)
    weights = load_file(tmp_path / "mismatch" / "adapter_model.safetensors")
    blocks = {int(name.split("layers.")[1].split(".")[0]) for name in weights}
    assert blocks == {4, 5, 6}
    assert any(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)
    after = load_file(target / "model.safetensors")
    assert all(after[name].equal(value) for name, value in before.items())


@pytest.mark.slow
def test_two_runs_of_one_plant_are_the_same(target, tmp_path):
    settings = planting.PlantSettings(target=str(target), n_documents=40, steps=2, batch_size=4)
    for run in ("a", "b"):
        planting.train_plant("word-hat", settings, tmp_path / run)
    first, second = (load_file(tmp_path / run / "word-hat" / "adapter_model.safetensors") for run in ("a", "b"))
    assert all(second[name].equal(value) for name, value in first.items())
