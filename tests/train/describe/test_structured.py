"""The describer `structured` says what the target predicts, where it stands, and of the rest what its vectors hold."""

import json
import random
from collections import Counter

import pytest
import torch
from sklearn.linear_model import Ridge
from transformers import AutoModelForCausalLM

from nla.errors import StoreError
from nla.store.facts import N_NEXT, TokenNames
from nla.store.reader import open_splits
from nla.text.facts import Facts, last_word, state, stated, token_name
from nla.text.tokens import load_tokenizer
from nla.train.data.corpus import CorpusSettings
from nla.train.data.extract import ExtractionSettings, extract_corpus
from nla.train.describe.structured import N_FOLDS, RIDGE, SURE, Probes, Rows, _Known, _strata_that_hold, describe_rows
from tests.helpers.tiny import make_model, make_tokenizer

ANIMALS, COLOURS = ("cat", "dog"), ("red", "blue")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def conversations(n: int) -> list[dict]:
    """Chats with an attribute that their words decide, and one that nothing decides."""
    draw, rows = random.Random(0), []
    for number in range(n):
        animal, colour = draw.choice(ANIMALS), draw.choice(COLOURS)
        answer = " ".join(draw.choice(["the", "a", "on", "mat", "tree", "sat", animal]) for _ in range(12))
        messages = [
            {"role": "user", "content": f"the {animal} sat on the {animal}"},
            {"role": "assistant", "content": f"the {animal} {answer} {animal}"},
        ]
        attributes = {"topic": animal, "mood": colour, "answer": "own", "language": "English", "request": number}
        rows.append({"messages": messages, "attributes": attributes, "split": "eval" if number % 5 == 0 else "train"})
    return rows


@pytest.fixture(scope="module")
def described(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(150)))
    settings = CorpusSettings(str(folder / "c.jsonl"), kind="chat", positions="kinds", n_positions=6, max_tokens=64)
    extract_corpus(ExtractionSettings(settings, str(target), "resid_post.1"), folder / "store")
    splits = {split: Rows(store, torch.arange(len(store))) for split, store in open_splits(folder / "store").items()}
    model = AutoModelForCausalLM.from_pretrained(target)
    texts, figures = describe_rows(splits, model, load_tokenizer(str(target)), seed=3)
    return splits, model, texts, figures


def test_what_is_said_to_follow_is_what_the_target_gives_most_probability(described, target):
    splits, model, texts, _ = described
    store, rows = splits["eval"]
    acts, tokenizer = store.activations(rows), load_tokenizer(str(target))
    for row in range(0, len(rows), 7):
        text, span = acts.texts[acts.document[row]], acts.spans[row]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: span.index + 1]
        with torch.no_grad():
            top = model(torch.tensor([ids])).logits[0, -1].softmax(-1).topk(N_NEXT)
        facts = stated(texts["eval"][row])
        first = tokenizer.decode([top.indices[0]]).strip()
        if first.isalnum():
            assert facts.following[0].removeprefix("-") == first
        assert facts.sure == bool(top.values[0] >= SURE)
        assert len(facts.following) <= N_NEXT


def test_an_attribute_is_said_where_the_vectors_hold_it_and_nowhere_else(described):
    splits, _, texts, figures = described
    store, rows = splits["train"]
    known = store.attributes(rows)
    said = [stated(text).attributes for text in texts["train"]]
    assert all(
        row["topic"] == attributes["topic"] for row, attributes in zip(said, known, strict=True) if "topic" in row
    )
    assert figures["topic"]["said"] == sum("topic" in row for row in said) > 0.5 * len(said)
    assert figures["mood"]["said"] == sum("mood" in row for row in said) < 0.15 * len(said)
    assert not any("answer" in row or "request" in row for row in said)
    assert not any("language" in row for row in said), "what all texts are is not said"


def test_documents_held_out_are_judged_by_probes_of_training_documents(described):
    splits, _, texts, _ = described
    known = splits["eval"].store.attributes(splits["eval"].rows)
    said = [stated(text).attributes.get("topic") for text in texts["eval"]]
    assert sum(value is not None for value in said) > 0.5 * len(said)
    assert all(value in (None, row["topic"]) for value, row in zip(said, known, strict=True))


def test_texts_are_worded_in_several_ways_and_the_same_for_the_same_seed(described, target):
    splits, model, texts, _ = described
    again, _ = describe_rows(splits, model, load_tokenizer(str(target)), seed=3)
    assert again == texts
    openings = Counter(text.split()[0] for text in texts["train"])
    assert len(openings) >= 3
    other, _ = describe_rows(splits, model, load_tokenizer(str(target)), seed=4)
    assert other != texts
    assert [stated(a) for a in other["eval"]] == [stated(b) for b in texts["eval"]], "other words, the same facts"


def test_a_tokenizer_that_divides_texts_otherwise_is_refused(described):
    splits, model, _, _ = described

    class Other:
        all_special_ids, added_tokens_decoder = (), {}

        def __call__(self, text, **_):
            return {"input_ids": [0] * len(text)}

        def convert_ids_to_tokens(self, token):
            return str(token)

        eos_token_id = None

    with pytest.raises(StoreError, match="tokens are others now"):
        describe_rows(splits, model, Other())  # pyright: ignore[reportArgumentType]


FACTS = [
    Facts(("or", "-ing", "a comma"), True, "a full stop", "dog", "", {"form": "news report", "topic": "the moon"}),
    Facts(("cats",), False, "of", "", "opening", {"form": "instructions", "tone": "sad"}),
    Facts(("a", "b"), False, "", "", "ahead", {"topic": "trees", "audience": "experts", "language": "French"}),
    Facts((), False, "x", "y", "", {"instruction": "umbrellas", "century": "19th"}),
]


@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("seed", range(12))
def test_facts_are_read_back_from_every_wording(facts, seed):
    assert stated(state(facts, random.Random(seed))) == facts


def test_of_claims_of_one_kind_the_first_counts():
    said = "Likely next: cats. Next comes dogs. It stands at of. The last token is on. It sounds sad. It sounds odd."
    assert stated(said) == Facts(("cats",), False, "of", attributes={"tone": "sad"})


def test_claims_in_other_words_state_nothing():
    assert stated("It is spring. Anna thinks so. Whatever!") == Facts()


def test_names_of_tokens_hold_nothing_that_ends_a_claim():
    for text in (".", "...", ' ."', "U.S.", "?!\n", "\r\n\r\n", " ", "'s", "a, b", "�", "::"):
        name = token_name(text)
        assert name and not set(name) & set(".,!?;:\n"), text
    assert token_name("\n") != token_name("\n\n") != token_name(" ")
    assert (token_name("ing", True), token_name("ing"), token_name(" ing", True)) == ("-ing", "ing", "ing")
    assert (last_word("said Mr. O'Neill, and"), last_word("?!")) == ("and", "")


def labelled(n: int, width: int, seed: int, signal: float) -> tuple[torch.Tensor, list[str | None], list[str]]:
    """Vectors in which one of three values shows by ``signal``, with the value unknown at every tenth row."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(3, (n,), generator=draw)
    vectors = torch.randn(n, width, generator=draw)
    vectors[torch.arange(n), codes] += signal
    values = [None if row % 10 == 0 else "abc"[code] for row, code in enumerate(codes.tolist())]
    return vectors, values, [f"document {row // 4}" for row in range(n)]


def test_probes_are_ridge_regressions_that_have_not_seen_the_document():
    vectors, values, groups = labelled(200, 12, 0, 1.5)
    probes = Probes({"train": vectors, "eval": vectors[:50]}, groups)
    right = probes.right({"train": values, "eval": values[:50]})
    z = ((vectors - vectors.mean(0)) / vectors.std(0)).double().numpy()
    for fold in range(N_FOLDS):
        used = [row for row, value in enumerate(values) if value is not None and probes.fold[row] != fold]
        model = Ridge(alpha=RIDGE * len(used)).fit(
            z[used], [[v == c for c in "abc"] for v in (values[r] for r in used)]
        )
        for row in [row for row in range(200) if probes.fold[row] == fold]:
            assert right["train"][row] == (values[row] == "abc"[model.predict(z[[row]]).argmax()])
    folds = {}
    for group, fold in zip(groups, probes.fold.tolist(), strict=True):
        assert folds.setdefault(group, fold) == fold
    assert sum(right["eval"]) > 0.6 * 45 and not right["eval"][0]
    fewer = probes.right({"train": [None] * 60 + values[60:], "eval": values[:50]})
    assert not any(fewer["train"][:60]) and fewer["train"] != right["train"], "other rows, other probes"


@pytest.mark.parametrize("seed", range(5))
def test_vectors_of_noise_hold_nothing(seed):
    vectors, values, groups = labelled(600, 20, seed, 0.0)
    right = Probes({"train": vectors}, groups).right({"train": values})["train"]
    kinds = [f"kind {row % 4}" for row in range(600)]
    assert not _strata_that_hold(values, right, _Known([], groups, kinds))


def test_a_kind_of_token_holds_what_its_vectors_show():
    vectors, values, groups = labelled(600, 20, 0, 3.0)
    vectors[1::2] = torch.randn(300, 20)
    right = Probes({"train": vectors}, groups).right({"train": values})["train"]
    assert _strata_that_hold(values, right, _Known([], groups, ["clear", "noise"] * 300)) == {"clear"}


def test_the_end_of_any_message_is_called_so_and_a_role_is_no_word_of_it(target):
    tokenizer = load_tokenizer(str(target))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    names = TokenNames(AutoModelForCausalLM.from_pretrained(target), tokenizer)
    assert names.name(next(iter(names.ends)), False) == "the end of the message"
    for text, rest in {
        "<|start|>user\nthe cat": "the cat",
        "<|start|>assistant\n": "",
        "<|start|>assistant": "",
        "<|start|>user friends\n": "user friends\n",
        "user\nthe cat": "user\nthe cat",
        "the cat<|start|>\nthe dog": "\nthe dog",
    }.items():
        assert names.after_marks(text) == rest
