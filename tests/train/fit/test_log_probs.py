"""Log-probabilities of rollouts: in pieces and with a shared prompt as in one pass over everything."""

from __future__ import annotations

import pytest
import torch

from nla.metrics import rescale
from nla.train.fit import log_probs
from nla.train.fit.log_probs import SharedPrompt, answer_log_probs, token_log_probs
from tests.helpers.tiny import D_MODEL, load_benchmark, make_pair


@pytest.mark.parametrize("bias", [True, False])
def test_pieces_have_the_values_and_the_gradient_of_the_whole(monkeypatch, bias) -> None:
    monkeypatch.setattr(log_probs, "TOKENS_PROJECTED", 10)
    monkeypatch.setattr(log_probs, "TOKENS_NORMALISED", 3)
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(16, 40, bias=bias), torch.randn(27, 16), torch.randint(1, 40, (27,))
    if bias:
        head.bias.data[0] = torch.finfo(torch.float32).min / 16  # a token that is forbidden
    weights = torch.randn(27)
    ours, whole = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    chosen, entropies, likeliest = token_log_probs(ours, head, targets, temperature=0.7)
    (chosen * weights).sum().backward()
    log_p = (head(whole) / 0.7).log_softmax(-1)
    expected = log_p.gather(1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(chosen, expected)
    torch.testing.assert_close(ours.grad, whole.grad)
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=log_p).entropy())
    assert torch.equal(likeliest, (log_p.argmax(-1) == targets).float())
    assert not entropies.requires_grad and not likeliest.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_prompt_has_the_log_probs_and_gradients_of_whole_rows(monkeypatch, dtype) -> None:
    monkeypatch.setattr(log_probs, "ROWS_TOGETHER", 2)  # several passes, of rows of like length
    pair = make_pair(scale=0.3)
    pair.base.to(dtype)
    generator = torch.Generator().manual_seed(0)
    vectors = rescale(torch.randn(3, D_MODEL, generator=generator), 4.0)
    owners, lengths = torch.tensor([2, 0, 1, 0, 2, 2, 1]), torch.tensor([5, 1, 3, 5, 2, 4, 3])
    answers, mask = torch.randint(11, 50, (7, 5), generator=generator), torch.arange(5) < lengths[:, None]
    weights, gradients, values = torch.randn(7, 5, generator=generator), [], []
    prompt = SharedPrompt(pair.prompt_ids[0], pair.marker_position, vectors, None)
    with pair.role("encoder"):
        for shared in (True, False):
            if shared:
                chosen = answer_log_probs(pair.base, prompt, owners, answers, mask, 1.0).chosen
            else:
                embedded = pair.base.get_input_embeddings()(torch.cat([prompt.ids.expand(7, -1), answers], dim=1))
                embedded[:, pair.marker_position] = vectors[owners].to(dtype)
                logits = pair.model(inputs_embeds=embedded).logits[:, len(prompt.ids) - 1 : -1].float()
                chosen = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0] * mask
            (chosen * weights).sum().backward()
            trained = [p for n, p in pair.model.named_parameters() if ".default." in n]
            gradients.append(torch.cat([p.grad.float().reshape(-1) for p in trained]))
            values.append(chosen.detach())
            pair.model.zero_grad()
    tolerance = 1e-5 if dtype == torch.float32 else 0.3
    assert (values[0] - values[1]).abs().max() < tolerance and (values[0][~mask] == 0).all()
    assert values[0][mask].std() > 0.5
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > (0.99999 if dtype == torch.float32 else 0.98)


@pytest.mark.slow
def test_the_benchmark_of_the_step_runs_both_sides(monkeypatch, capsys) -> None:
    arguments = "joint_step.py --shape couplets --rounds 1 --prompts 4 --group-size 2 --tokens 4"
    monkeypatch.setattr("sys.argv", arguments.split())
    load_benchmark("joint_step").main()
    said = capsys.readouterr().out
    rows = {line[:20].strip(): line[20:].split() for line in said.splitlines()}
    assert len(rows["rollouts a second"]) == 2 and all(float(rate) > 0 for rate in rows["rollouts a second"])
    assert all(float(rows[phase][1]) > 0 for phase in ("sampling", "log_probs", "reference", "backward", "decoder"))
    largest = float(said.partition("prompt shared and not, largest ")[2].split(";")[0])
    assert largest < 1e-4
