"""How the target is made: splicing, the interchange loss, and resuming."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nla.errors import RecipeError
from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.train.organisms import pretraining
from nla.train.organisms.couplets import (
    CoupletData,
    OrganismSettings,
    build_model,
    collate,
    interchange_loss,
    splice,
    train_organism,
)
from nla.train.organisms.interchange import next_token_loss
from nla.train.organisms.pretraining import LossTrainer

SMALL = OrganismSettings(n_documents=24, steps=4, batch_size=6, n_explanation_rows=2, d_model=16, interchange_after=1)


def batch():
    tokenizer = couplets_tokenizer.build()
    data = CoupletData(tokenizer, 6, seed=3)
    return tokenizer, data, collate([data[i] for i in range(6)], tokenizer.pad_token_id, 2)


def test_a_splice_is_the_base_up_to_its_newline_and_the_donor_after():
    tokenizer, data, inputs = batch()
    newline, pad = inputs["newline"], tokenizer.pad_token_id
    donor = torch.tensor([1, 2, 3, 4, 5, 0])
    mixed = splice(inputs["input_ids"][:6], newline, donor, pad)
    for i, d in enumerate(donor.tolist()):
        expected = data.ids[i][: data.newline[i] + 1] + data.ids[d][data.newline[d] + 1 :]
        found = [token for token in mixed[i].tolist() if token != pad]
        assert found == expected[: mixed.shape[1]]


def test_next_token_loss_is_the_mean_negative_log_probability_of_the_kept_tokens():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    keep = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]])
    terms = [-logits[b, t - 1].log_softmax(-1)[ids[b, t]] for b in range(2) for t in range(1, 5) if keep[b, t]]
    torch.testing.assert_close(next_token_loss(logits, ids, keep), torch.stack(terms).mean())


def test_the_interchange_loss_with_a_donor_like_its_base_is_the_loss_of_the_plain_continuation():
    tokenizer, _, inputs = batch()
    ids, newline = inputs["input_ids"][:1].expand(6, -1), inputs["newline"][:1].expand(6)
    model = build_model(SMALL, tokenizer)
    newlines = torch.arange(6), newline
    states: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: states.append(out)) for block in model.model.layers]
    plain = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    captured = {layer: state[newlines] for layer, state in enumerate(states)}
    settings = OrganismSettings(d_model=16, wrong_block_share=0.0)
    after = torch.arange(ids.shape[1]) > newline[:, None]
    expected = next_token_loss(plain, ids, after & (ids != tokenizer.pad_token_id))
    found = interchange_loss(model, ids, newline, captured, settings, tokenizer.pad_token_id)
    torch.testing.assert_close(found, expected)


def test_in_the_plain_variant_the_donor_changes_nothing_but_the_first_word_that_stands_there():
    tokenizer, _, inputs = batch()
    ids, newline, seen = inputs["input_ids"][:6], inputs["newline"], []
    model = build_model(SMALL, tokenizer)
    captured = {layer: torch.randn(6, 16) for layer in range(len(model.model.layers))}
    settings = OrganismSettings(variant="plain", d_model=16)
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    interchange_loss(model, ids, newline, captured, settings, tokenizer.pad_token_id).backward()
    rows, expected = torch.arange(6), ids.clone()
    expected[rows, newline + 1] = ids[rows.roll(1), newline.roll(1) + 1]
    assert torch.equal(seen[0], expected)
    assert model.model.layers[-1].mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_folder_of_another_organism_is_refused(tmp_path):
    train_organism(SMALL, tmp_path / "plain")
    before = load_file(tmp_path / "plain" / "model.safetensors")
    for change in ({"seed": 1}, {"variant": "plain"}, {"n_documents": 25}):
        with pytest.raises(RecipeError, match=r"plain\.checkpoints"):
            train_organism(replace(SMALL, **change), tmp_path / "plain")
    after = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_an_interrupted_organism_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(pretraining.PRETRAINING, "save_steps", 2)
    train_organism(SMALL, tmp_path / "whole")

    class Stop(Exception):
        pass

    step = LossTrainer.compute_loss

    def stop_at_3(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Stop
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LossTrainer, "compute_loss", stop_at_3)
    with pytest.raises(Stop):
        train_organism(SMALL, tmp_path / "cut")
    monkeypatch.setattr(LossTrainer, "compute_loss", step)
    train_organism(SMALL, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], rtol=0, atol=0)
