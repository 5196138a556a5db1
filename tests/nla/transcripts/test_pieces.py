"""Long texts in pieces: the very tokens that the tokenizer gives for the whole, for every kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nla.transcripts import pieces
from nla.transcripts.pieces import tokenise
from tests.helpers.tiny import WORDS, make_tokenizer

SPLIT = r"\s+(?!\S)|\s+| ?[\p{L}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
ODD = [
    "\n\n\n",
    "    ",
    "\t",
    "e\u0301",
    "ﬁ",
    "\U0001f469\u200d\U0001f4bb",
    "漢字かな",
    "1234567",
    "<|end|>",
    "---",
    "x" * 40,
    "\u202e",
]


def text(seed: int, n_words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(ODD) if draw.random() < 0.2 else f" {draw.choice(WORDS)}" for _ in range(n_words))


def trained(model: str, change: Callable[[Tokenizer], None]) -> PreTrainedTokenizerFast:
    made = {"bpe": (models.BPE, trainers.BpeTrainer), "unigram": (models.Unigram, trainers.UnigramTrainer)}
    kind, trainer = made[model]
    backend = Tokenizer(kind())
    change(backend)
    unknown = {"unk_token": "<unk>"} if model == "unigram" else {}
    special = ["<unk>", AddedToken("<|end|>", special=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text(99, 3000)],
        trainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **unknown),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_level(backend: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()


def metaspace(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")


def whole_text(backend: Tokenizer) -> None:
    """As Llama 2 and Gemma: nothing is split before the merges."""
    backend.normalizer = normalizers.Replace(" ", "▁")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "words": make_tokenizer,
    "byte-level BPE": lambda: trained("bpe", byte_level),
    "BPE of the whole text": lambda: trained("bpe", whole_text),
    "unigram": lambda: trained("unigram", metaspace),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_give_the_tokens_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, long = TOKENIZERS[name](), text(1, 4000)
    batch = tokenizer(long, add_special_tokens=False, return_offsets_mapping=True)
    calls = []
    plain = pieces._piece
    monkeypatch.setattr(pieces, "_piece", lambda *args: calls.append(args[2:]) or plain(*args))
    monkeypatch.setattr(pieces, "WHOLE", 1000)
    monkeypatch.setattr(pieces, "OVERLAP", 400)
    for piece in (1500, 2111, 4096):
        monkeypatch.setattr(pieces, "PIECE", piece)
        calls.clear()
        found = tokenise(tokenizer, long)
        assert found.ids.tolist() == batch["input_ids"]
        assert torch.stack(found[1:], 1).tolist() == [list(offset) for offset in batch["offset_mapping"]]
        assert len(calls) > len(long) / piece and (0, len(long)) not in calls, "in pieces, and never as a whole"


def test_where_pieces_do_not_agree_the_text_is_tokenised_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["byte-level BPE"]()
    long = "xy" * 3000  # one word: where it is cut decides its tokens
    for name, value in (("WHOLE", 1000), ("PIECE", 1501), ("OVERLAP", 100)):
        monkeypatch.setattr(pieces, name, value)
    assert tokenise(tokenizer, long).ids.tolist() == tokenizer(long, add_special_tokens=False)["input_ids"]
