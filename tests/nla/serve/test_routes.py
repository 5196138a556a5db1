"""What the routes of `nla serve` answer, held against the library called directly."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from nla.autoencoder import NLA
from nla.errors import NLAError
from nla.metrics import cosine
from nla.pair.steer import edit_direction, generate_patched
from tests.helpers.serve import LINE, REQUESTS, example

EDIT = {"before": "The next line ends with cat.", "after": "The next line ends with bat."}


def ask(client: Any, route: str, **body: Any) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def vectors_of(answer: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([token["activation"] for token in answer["tokens"]])


@pytest.mark.parametrize("positions", [[-1, 2], []])
def test_explanations_are_those_of_the_library(client: Any, couplets: NLA, positions: list[int]) -> None:
    results = ask(client, "/explain", text=LINE, positions=positions, seed=5)["results"]
    acts = couplets.read(LINE, positions or "all")
    direct = couplets.explain(acts, seed=5)
    assert [[sample["text"] for sample in one["samples"]] for one in results] == direct.texts
    assert [[sample["claims"] for sample in one["samples"]] for one in results] == [one.claims for one in direct]
    assert [(one["position"], one["token"]) for one in results] == [(span.index, span.text) for span in acts.spans]
    for one, theirs in zip(results, direct, strict=True):
        assert one["trust"]["level"] == theirs.trust.level
        assert one["trust"]["margin"] == pytest.approx(theirs.margin, abs=1e-5)
        assert one["mse"] == pytest.approx(2 - 2 * theirs.trust.cosine, abs=1e-5)
        assert one["description"] in theirs.texts
    assert [one["l2_norm"] for one in results] == pytest.approx(acts.vectors.norm(dim=1).tolist(), rel=1e-5)


def test_greedy_and_longest_explanations_are_those_of_the_library(client: Any, couplets: NLA) -> None:
    acts = couplets.read(LINE, "last")
    (one,) = ask(client, "/explain", text=LINE, positions=[-1], temperature=0)["results"]
    assert [sample["text"] for sample in one["samples"]] == couplets.explain(acts, greedy=True)[0].texts
    (short,) = ask(client, "/explain", text=LINE, positions=[-1], max_new_tokens=3, samples=2)["results"]
    assert [sample["text"] for sample in short["samples"]] == couplets.explain(acts, 2, max_new_tokens=3)[0].texts
    assert not any(sample["complete"] for sample in short["samples"])


def test_activations_are_those_of_the_library(client: Any, couplets: NLA) -> None:
    read = vectors_of(ask(client, "/extract", text=LINE, positions=[-1, 0]))
    assert torch.allclose(read, couplets.read(LINE, [-1, 0]).vectors, atol=1e-5)


def test_vectors_are_described_as_the_library_describes_them(client: Any, couplets: NLA) -> None:
    acts = couplets.read(LINE, [3, -1]).vectors
    results = ask(client, "/describe", activations=acts.tolist(), seed=2, samples=3)["results"]
    direct = couplets.explain(acts, 3, seed=2)
    assert [[sample["text"] for sample in one["samples"]] for one in results] == direct.texts


def test_a_comparison_describes_the_difference(client: Any, couplets: NLA) -> None:
    a, b = couplets.read([LINE, LINE.replace("rat", "tree")], "last").vectors
    answer = ask(client, "/compare", activation_a=a.tolist(), activation_b=b.tolist())
    direct = couplets.explain((a - b)[None])[0]
    assert [sample["text"] for sample in answer["samples"]] == direct.texts
    assert answer["diff_norm"] == pytest.approx(float((a - b).norm()), rel=1e-5)


def test_a_score_is_that_of_the_library(client: Any, couplets: NLA) -> None:
    text, acts = couplets.explain(couplets.read(LINE, "last"))[0].texts[0], couplets.read(LINE, "last")
    of_token = ask(client, "/score", description=text, text=LINE, before=EDIT["before"])
    of_vector = ask(client, "/score", description=text, activation=acts.vectors[0].tolist(), before=EDIT["before"])
    assert of_token == pytest.approx(of_vector, abs=1e-5)
    rebuilt, other = couplets.reconstruct([text, EDIT["before"]])
    scored = couplets.score(acts, rebuilt[None], n_boot=2)
    assert of_token["fve"] == pytest.approx(scored.fve.value, abs=1e-4)
    assert of_token["cosine_similarity"] == pytest.approx(scored.cosine.value, abs=1e-5)
    assert of_token["moved"] == pytest.approx(float(cosine(rebuilt[None], other[None])), abs=1e-5)
    knows_nothing = torch.stack([couplets.decoder.decode([""], strict=False)[0], couplets.baselines["global"].mean])
    margin = scored.cosine.value - float(cosine(acts.vectors.expand(2, -1), knows_nothing).max())
    assert of_token["margin"] == pytest.approx(margin, abs=1e-5) and margin > 0.1


def test_completions_are_those_of_the_library_steered_or_not(client: Any, couplets: NLA) -> None:
    direction = edit_direction(couplets.decoder, **EDIT)
    control = torch.randn(direction.shape, generator=torch.Generator().manual_seed(3))

    def direct(vector: torch.Tensor | None) -> str:
        with couplets.role("target"):
            vectors, strength = (None, None) if vector is None else (vector[None], 3.0)
            where = (couplets.base, couplets.tokenizer, [LINE], couplets.point, "last")
            return generate_patched(*where, vectors, 12, strength)[0]

    steer = {"edit": EDIT, "strength": 3.0}
    asked = {"text": LINE, "completion_tokens": 12}
    plain = ask(client, "/completion", **asked)
    assert (plain["completion"], plain["steered"]) == (direct(None), False)
    assert plain["text"] == LINE + plain["completion"]
    assert ask(client, "/completion", **asked, steer=steer)["completion"] == direct(direction)
    assert ask(client, "/completion", **asked, steer={**steer, "control": 3})["completion"] == direct(control)
    vector = {"vector": direction.tolist(), "strength": 3.0}
    assert ask(client, "/completion", **asked, steer=vector)["completion"] == direct(direction)
    assert direct(direction) != direct(None), "without an effect of the steering this test is void"


def test_sampled_completions_depend_on_their_seed_alone(client: Any) -> None:
    asked = {"text": LINE, "completion_tokens": 12, "temperature": 4}
    first, again, other = (ask(client, "/completion", **asked, seed=seed)["completion"] for seed in (1, 1, 2))
    assert first == again != other


def test_a_direction_added_below_the_point_changes_that_token_and_those_after_it(client: Any) -> None:
    plain = vectors_of(ask(client, "/extract", text=LINE))
    steer = {"vector": [1.0] * 64 + [-1.0] * 64, "position": 5, "point": "resid_post.1"}
    steered = vectors_of(ask(client, "/extract", text=LINE, steer=steer))
    moved = (steered - plain).norm(dim=1) / plain.norm(dim=1)
    assert (moved[:5] < 1e-5).all() and (moved[5:] > 1e-3).all()
    (one,) = ask(client, "/explain", text=LINE, steer=steer, positions=[-1], samples=1)["results"]
    assert one["l2_norm"] == pytest.approx(float(steered[-1].norm()), rel=1e-4)


def test_a_direction_added_at_the_point_moves_that_token_alone_by_the_strength(client: Any) -> None:
    plain = vectors_of(ask(client, "/extract", text=LINE))
    direction = torch.randn(plain.shape[1], generator=torch.Generator().manual_seed(1))
    steer = {"vector": direction.tolist(), "position": 5, "strength": 0.5}
    steered = vectors_of(ask(client, "/extract", text=LINE, steer=steer))
    expected = plain[5] + 0.5 * plain[5].norm() * direction / direction.norm()
    assert torch.allclose(steered[5], expected, atol=1e-4)
    assert torch.allclose(steered[:5], plain[:5], atol=1e-5) and torch.allclose(steered[6:], plain[6:], atol=1e-5)
    assert torch.equal(vectors_of(ask(client, "/extract", text=LINE)), plain), "steered activations must not be kept"


def test_tokens_have_their_characters(client: Any) -> None:
    answer = ask(client, "/tokenize", text=LINE)
    assert "".join(token["token"] for token in answer["tokens"]) == LINE == answer["text"]
    assert all(LINE[one["start"] : one["end"]] == one["token"] for one in answer["tokens"])
    assert [token["position"] for token in answer["tokens"]] == list(range(answer["prompt_length"]))


def test_tokens_that_share_a_character_say_which_part_they_are() -> None:
    from nla.serve.answers import tokenized
    from nla.serve.prepare import Prepared
    from nla.text.tokens import Encoded, Span

    spans = [Span(7, "🎉", 0, 1, 0, False, 1, 2), Span(8, "🎉", 0, 1, 1, False, 2, 2), Span(9, "!", 1, 2, 2)]
    tokens = tokenized(Prepared(Encoded([7, 8, 9], spans, "🎉!"), None)).tokens
    assert [(one.fragment_index, one.fragment_count) for one in tokens] == [(0, 2), (1, 2), (0, 1)]


def test_pairs_say_what_they_are(client: Any, couplets: NLA) -> None:
    (one,) = client.get("/pairs").json()["pairs"]
    expected = {"name": "couplets", "point": "resid_post.3", "layer_index": 3, "d_model": 128, "target_adapters": []}
    assert expected.items() <= one.items()
    assert one["metrics"]["recipe"] == couplets.metrics["recipe"]


def test_metrics_count_requests_by_route_and_status(client: Any) -> None:
    def count(route: str, status: int) -> float:
        lines = client.get("/metrics").text.splitlines()
        wanted = f'nla_requests_total{{route="{route}",status="{status}"}} '
        return sum(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))

    before = count("/tokenize", 200), count("/tokenize", 422), count("none", 404)
    client.post("/tokenize", json={"text": LINE})
    client.post("/tokenize", json={})
    client.get(f"/{'x' * 50}")
    assert (count("/tokenize", 200), count("/tokenize", 422), count("none", 404)) == tuple(n + 1 for n in before)
    assert 'nla_works_total{kind="call"}' in client.get("/metrics").text


@pytest.mark.parametrize(
    "route, status, body",
    [
        ("/explain", 404, {"text": LINE, "pair": "none"}),
        ("/explain", 404, {"text": LINE, "target_adapter": "/etc"}),
        ("/completion", 404, {"text": LINE, "target_adapter": "/etc"}),
        ("/explain", 422, {"text": "xylophones"}),
        ("/explain", 422, {"text": ""}),
        ("/explain", 422, {}),
        ("/explain", 422, {"text": LINE, "messages": [{"role": "user", "content": "In spring"}]}),
        ("/explain", 422, {"text": LINE, "samplez": 3}),
        ("/explain", 422, {"text": LINE, "samples": 10_000}),
        ("/explain", 422, {"text": LINE, "temperature": -1}),
        ("/explain", 422, {"text": LINE, "positions": [99]}),
        ("/explain", 422, {"text": LINE, "positions": [0] * 1000}),
        ("/explain", 422, {"text": LINE, "near": 99}),
        ("/explain", 422, {"text": LINE, "max_new_tokens": 4096}),
        ("/explain", 422, {"text": "In spring " * 100}),
        ("/explain", 422, {"text": "x" * 70_000}),
        ("/explain", 422, {"text": "\ud800"}),
        ("/tokenize", 422, {"messages": [{"role": "user", "content": "x" * 40_000}] * 2}),
        ("/tokenize", 422, {"messages": [{"role": "nobody", "content": "In spring"}]}),
        ("/describe", 422, {"activations": [[1.0, 2.0]]}),
        ("/describe", 422, {"activations": [[0.0] * 128]}),
        ("/describe", 422, {"activations": [[1e300] * 128]}),
        ("/describe", 422, {"activations": []}),
        ("/compare", 422, {"activation_a": [1.0] * 128, "activation_b": [1.0] * 128}),
        ("/score", 422, {"description": "", "text": LINE}),
        ("/score", 422, {"description": " ", "text": LINE}),
        ("/score", 422, {"description": "The next line ends with cat."}),
        ("/score", 422, {"description": "xylophones", "text": LINE}),
        ("/completion", 422, {"text": LINE, "steer": {"strength": 1}}),
        ("/completion", 422, {"text": LINE, "steer": {"vector": [1.0]}}),
        ("/completion", 422, {"text": LINE, "steer": {"vector": [1.0] * 128, "point": "resid_post.99"}}),
        ("/extract", 422, {"text": LINE, "steer": {"vector": [1.0] * 128, "point": "resid_post.4"}}),
        ("/completion", 422, {"text": LINE, "steer": {"vector": [0.0] * 128}}),
        ("/completion", 422, {"text": LINE, "steer": {"edit": {"before": "In spring", "after": "In spring"}}}),
        ("/completion", 422, {"text": LINE, "steer": {"vector": [1.0] * 128, "position": 99}}),
        ("/completion", 422, {"text": LINE, "completion_tokens": 500}),
    ],
)
def test_what_is_wrong_is_refused_with_what_to_do(client: Any, route: str, status: int, body: dict[str, Any]) -> None:
    answer = client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"got", "expected", "fix"} and all(answer.json().values())
    assert len(answer.text) < 3500, "what is wrong must not be sent back whole"
    good = client.post(route, json=example(route))
    assert good.status_code == 200, "one wrong request must not spoil the next"


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b'{"activations": [[NaN]]}', b"\xff\xfe", b'{"text": 1}'])
def test_what_is_no_request_is_refused(client: Any, body: bytes) -> None:
    for route in REQUESTS:
        answer = client.post(route, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422 and all(answer.json().values()), (route, answer.text)


def test_unknown_routes_and_methods_are_refused_with_what_to_do(client: Any) -> None:
    assert client.get("/nowhere").status_code == 404 and "/nowhere" in client.get("/nowhere").json()["got"]
    assert client.get("/explain").status_code == 405 and client.get("/explain").json()["fix"]
    assert client.get("/static/../app.py").status_code == 404


def test_a_fault_of_the_server_is_logged_and_not_sent(
    client: Any, couplets: NLA, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(couplets, "explain", broken)
    answer = client.post("/explain", json={"text": LINE, "seed": 12345})
    assert answer.status_code == 500 and "secret" not in answer.text and answer.json()["fix"]
    assert "a secret" in caplog.text
    monkeypatch.undo()
    assert client.post("/explain", json={"text": LINE, "seed": 12345}).status_code == 200


def test_every_typed_error_of_input_is_a_refusal_and_no_fault() -> None:
    """By the form of the class, so that a new error needs no entry anywhere."""
    from nla import errors
    from nla.serve.answers import typed

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ValueError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert issubclass(kind, NLAError) and typed(kind("a", "b", "c"))[1] == 422
    assert typed(errors.WeightsError("a", "b", "c"))[1] == 500
