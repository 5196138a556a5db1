"""Documents come from where they are said to, each once, in an order that stays, or the error says what is wrong."""

import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from nla.errors import ArgumentError, ConfigError, CorpusError, TranscriptError, VocabularyError
from nla.text.tokens import encode_batch
from nla.train.data import corpus as corpora
from nla.train.data import documents
from nla.train.data.corpus import CorpusSettings, open_corpus
from nla.train.data.documents import Reader
from nla.transcripts.messages import Transcript
from tests.helpers.tiny import make_tokenizer

WORDS = ["the", "a", "cat", "dog", "red", "blue", "sat", "ran", "on", "under", "mat", "tree"]
TEXTS = [f"the cat {word}" for word in WORDS]
CHAT = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": " a dog ran under the tree "}]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setattr(corpora, "hub_commit", lambda settings: None)


def long_texts(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(8, 40))) for _ in range(n)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def contents(settings: CorpusSettings, wanted=lambda chunk: True):
    chunks = open_corpus(settings).chunks(settings, wanted)
    return [(entry.number, entry.parse()) for _, entries in chunks for entry in entries or ()]


def texts_of(settings: CorpusSettings) -> list[str]:
    return [content for _, content in contents(settings)]


def prepare(tokenizer, settings: CorpusSettings, seed: int = 0):
    chunks = open_corpus(settings).chunks(settings, lambda chunk: True)
    reader = Reader(tokenizer, settings, seed)
    return [reader.prepare(chunk, entries) for chunk, entries in chunks]


@pytest.fixture
def parquet(tmp_path):
    pq.write_table(pa.table({"text": TEXTS, "n": range(len(TEXTS))}), tmp_path / "c.parquet", row_group_size=5)
    return str(tmp_path / "c.parquet")


def test_parquet_jsonl_and_lines_give_the_same_documents(tmp_path, parquet):
    jsonl = write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "text": text} for text in TEXTS])
    (tmp_path / "c.txt").write_text("\n".join(TEXTS) + "\n")
    assert texts_of(CorpusSettings(parquet)) == texts_of(CorpusSettings(jsonl)) == TEXTS
    assert texts_of(CorpusSettings(str(tmp_path / "c.txt"), kind="lines")) == TEXTS
    assert texts_of(CorpusSettings(str(tmp_path / "c.txt"))) == ["\n".join(TEXTS) + "\n"]


@pytest.mark.parametrize("n", [1, 3, len(TEXTS), 99, None])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_mixed_documents_follow_the_first_of_the_source_however_many_these_are(tmp_path, n, size):
    source = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in TEXTS])
    mixed = write_jsonl(tmp_path / "more.jsonl", [{"text": text} for text in ("one more", "and another")])
    settings = CorpusSettings(source, n_documents=n, mix=[mixed], documents_per_chunk=size)
    assert contents(settings) == list(enumerate([*TEXTS[:n], "one more", "and another"]))


def test_folders_and_globs_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.md"):
        (tmp_path / name).write_text(name)
    assert texts_of(CorpusSettings(str(tmp_path))) == ["a.txt", "b.txt"]
    assert texts_of(CorpusSettings(str(tmp_path / "**" / "*.txt"))) == ["a.txt", "b.txt", "deep/c.txt"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_gives_its_rows_streamed_or_not(monkeypatch, streaming):
    asked = []
    data = datasets.Dataset.from_dict({"text": TEXTS, "other": TEXTS})

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    settings = CorpusSettings(
        "some/data", config="en", split="test", revision="abc", streaming=streaming, n_documents=7
    )
    assert texts_of(settings) == TEXTS[:7]
    assert asked[0] == (("some/data", "en"), {"split": "test", "revision": "abc", "streaming": streaming})


class Stream:
    """A streamed dataset that breaks off after its rows."""

    column_names = ("text",)

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield from ({"text": text} for text in TEXTS[:5])
        raise self.error

    def select_columns(self, columns):
        return self


class Broken(Exception):
    """As the clients of networks raise: of no kind that Python knows."""


@pytest.mark.parametrize("error", [OSError("reset"), EOFError("cut"), ValueError("zstd"), Broken("timeout")])
def test_a_stream_that_breaks_off_is_an_error_that_says_to_run_it_again(monkeypatch, error):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Stream(error))
    settings = CorpusSettings("some/data", streaming=True, documents_per_chunk=2)
    with pytest.raises(CorpusError, match=r"after 5 rows .* Next: run the same command again") as caught:
        texts_of(settings)
    assert caught.value.__cause__ is error
    assert len(texts_of(CorpusSettings("some/data", streaming=True, n_documents=5))) == 5

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(CorpusError, match="cannot be loaded"):
        open_corpus(settings)


def test_a_dataset_is_read_at_one_commit(monkeypatch):
    asked = []
    data = datasets.Dataset.from_dict({"text": TEXTS})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **how: asked.append(how["revision"]) or data)
    assert open_corpus(CorpusSettings("some/data", revision="v1")).about["commit"] is None and asked == ["v1"]
    monkeypatch.setattr(corpora, "hub_commit", lambda settings: f"commit of {settings.revision}")
    assert open_corpus(CorpusSettings("some/data", revision="v1")).about["commit"] == "commit of v1" == asked[1]
    assert open_corpus(CorpusSettings("some/data"), "abc").about["commit"] == "abc" == asked[2]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_divide_the_documents_and_number_them_alike(parquet, processes):
    settings = CorpusSettings(parquet, documents_per_chunk=3, n_documents=11)
    shares = [contents(settings, lambda chunk, own=own: chunk % processes == own) for own in range(processes)]
    assert sorted(entry for share in shares for entry in share) == list(enumerate(TEXTS[:11]))


def test_chats_are_found_by_their_column_or_their_file(tmp_path):
    jsonl = write_jsonl(tmp_path / "c.jsonl", [{"messages": CHAT}] * 2)
    pq.write_table(pa.table({"messages": [CHAT, CHAT]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"conversation": [CHAT, CHAT]}), tmp_path / "d.parquet")
    (tmp_path / "one.json").write_text(json.dumps(CHAT))
    (tmp_path / "one.txt").write_text("User: the cat sat\nAssistant: a dog")
    for source, column, kind, n in [
        (jsonl, None, None, 2),
        (str(tmp_path / "c.parquet"), None, None, 2),
        (str(tmp_path / "d.parquet"), "conversation", None, 2),
        (str(tmp_path / "one.json"), None, None, 1),
        (str(tmp_path / "one.txt"), None, "chat", 1),
    ]:
        found = texts_of(CorpusSettings(source, text_column=column, kind=kind))
        assert len(found) == n and all(isinstance(each, Transcript) and len(each.messages) == 2 for each in found)


@pytest.mark.parametrize("positions", ["random", "last", "every:7"])
def test_positions_are_late_and_never_special(tokenizer, tmp_path, positions):
    source = write_jsonl(tmp_path / "c.jsonl", [{"text": f"{text}<|end|>"} for text in long_texts(30)])
    settings = CorpusSettings(source, positions=positions, n_positions=4, first_position=10, max_tokens=64)
    (chunk,) = prepare(tokenizer, settings)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for document in chunk.documents:
        (whole,) = encode_batch(tokenizer, [document.text], None)
        assert all(span == whole.spans[span.index] and span.token_id != end for span in document.spans)
        indexes = [span.index for span in document.spans]
        expected = {
            "last": [len(whole.ids) - 2],
            "every:7": list(range(10, len(whole.ids) - 1, 7)),
            "random": sorted(indexes),
        }
        assert indexes == expected[positions]
        if positions == "random":
            assert len(set(indexes)) == min(4, len(whole.ids) - 1 - 10) and min(indexes) >= 10
    assert chunk.counts["short"] == 30 - len(chunk.documents) and (chunk.counts["short"] > 0) == (positions != "last")


def test_the_draw_depends_on_the_text_and_the_seed_alone(tokenizer, tmp_path):
    texts = long_texts(40)
    found = []
    for name, order, size, seed in [("a", texts, 512, 0), ("b", [*texts[::-1], "the cat"], 7, 0), ("c", texts, 512, 1)]:
        source = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in order])
        settings = CorpusSettings(source, first_position=3, n_positions=2, documents_per_chunk=size, max_tokens=64)
        chunks = prepare(tokenizer, settings, seed)
        found.append({d.text: (d.spans, s) for c in chunks for d, s in zip(c.documents, c.splits, strict=True)})
    assert found[0] == found[1] and len(found[0]) == 40
    assert {text: split for text, (_, split) in found[2].items()} == {t: split for t, (_, split) in found[0].items()}
    assert sum(found[2][text][0] != found[0][text][0] for text in texts) > 30


def test_every_token_is_equally_likely_to_be_drawn(tokenizer, tmp_path):
    draw = random.Random(5)
    texts = [" ".join(draw.choices(WORDS, k=20)) for _ in range(600)]
    settings = CorpusSettings(
        write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in texts]), first_position=10, n_positions=2
    )
    counts = [0] * 20
    for chunk in prepare(tokenizer, settings):
        for document in chunk.documents:
            for span in document.spans:
                counts[span.index] += 1
    assert counts[:10] == [0] * 10 and sum(counts) == 1200
    assert all(abs(count - 120) < 5 * 11 for count in counts[10:])  # five standard deviations


def test_a_fifth_of_duplicates_falls_into_one_split_each(tokenizer, tmp_path):
    texts = list(dict.fromkeys(long_texts(400)))
    rows = texts + random.Random(1).choices(texts, k=len(texts) // 4)  # a fifth of all
    random.Random(2).shuffle(rows)
    source = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in rows])
    splits = {"train": set(), "eval": set()}
    for chunk in prepare(
        tokenizer, CorpusSettings(source, first_position=0, eval_fraction=0.3, documents_per_chunk=50)
    ):
        for document, split in zip(chunk.documents, chunk.splits, strict=True):
            splits[split].add(document.text)
    assert splits["train"].isdisjoint(splits["eval"]) and splits["train"] | splits["eval"] == set(texts)
    assert 0.2 < len(splits["eval"]) / len(texts) < 0.4


def test_long_documents_are_cut_counted_and_compared_by_what_is_left(tokenizer, tmp_path):
    opening = "the cat sat on the mat"
    rows = [f"{opening} under {word}" for word in WORDS] + [opening, "a dog ran"]
    settings = CorpusSettings(
        write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in rows]), max_tokens=6, positions="last"
    )
    (chunk,) = prepare(tokenizer, settings)
    assert chunk.counts["cut"] == len(WORDS) and chunk.counts["read"] == len(rows)
    assert {document.text for document in chunk.documents} == {opening, "a dog ran"}
    assert len(set(chunk.splits[:-1])) == 1 and chunk.counts["tokens"] == 6 * (len(WORDS) + 1) + 3


def test_empty_short_and_unreadable_documents_are_left_out_and_counted(tokenizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(documents.log, "warning", lambda text, *values: said.append(text % values))
    rows = ["the cat sat on a mat", "", "  \n", "the", "\ud800 cat", "the zebra sat on a mat", None]
    settings = CorpusSettings(write_jsonl(tmp_path / "c.jsonl", [{"text": row} for row in rows]), first_position=2)
    (chunk,) = prepare(tokenizer, settings)
    assert {k: chunk.counts[k] for k in ("seen", "read", "empty", "short", "refused")} == {
        "seen": 7,
        "read": 1,
        "empty": 3,
        "short": 1,
        "refused": 2,
    }
    assert any("Document 5 is left out" in line and "zebra" in line for line in said)


def test_a_document_that_holds_the_end_token_of_a_gpt2_like_tokenizer_is_read(tmp_path):
    """Its tokenizer knows every text, and names one token beginning, end and unknown."""
    tokenizer = make_tokenizer()
    tokenizer.unk_token = tokenizer.bos_token = tokenizer.eos_token
    rows = [{"text": f"the cat sat on a mat{tokenizer.eos_token}a dog ran under the tree"}]
    settings = CorpusSettings(write_jsonl(tmp_path / "c.jsonl", rows), first_position=2)
    (chunk,) = prepare(tokenizer, settings)
    assert (chunk.counts["read"], chunk.counts["refused"]) == (1, 0)


def test_an_unknown_token_that_the_tokenizer_adds_itself_does_not_drop_documents(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|unk|> $A", special_tokens=[("<|unk|>", tokenizer.unk_token_id)]
    )
    rows = [{"text": "the cat sat on a mat"}, {"text": "the zebra sat on a mat"}]
    settings = CorpusSettings(write_jsonl(tmp_path / "c.jsonl", rows), first_position=2)
    (chunk,) = prepare(tokenizer, settings)
    assert (chunk.counts["read"], chunk.counts["refused"]) == (1, 1)


def test_only_tokens_up_to_the_last_one_read_are_run(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in long_texts(20)])
    (chunk,) = prepare(tokenizer, CorpusSettings(source, first_position=0, n_positions=2))
    for ids, document in zip(chunk.ids, chunk.documents, strict=True):
        assert len(ids) == document.spans[-1].index + 1 and ids[-1] == document.spans[-1].token_id


def test_chats_are_read_as_the_targets_own_with_roles_for_strata(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", [{"messages": CHAT}])
    (chunk,) = prepare(tokenizer, CorpusSettings(source, first_position=0, n_positions=100))
    (document,) = chunk.documents
    expected = [{**message, "content": message["content"].strip()} for message in CHAT]
    assert document.text == tokenizer.apply_chat_template(expected, tokenize=False)
    assert [span.text.strip() for span in document.spans] == [
        "the",
        "cat",
        "sat",
        "a",
        "dog",
        "ran",
        "under",
        "the",
        "tree",
    ]
    assert document.strata == ["user"] * 3 + ["assistant"] * 6
    (chunk,) = prepare(tokenizer, CorpusSettings(source, positions="turns"))
    (document,) = chunk.documents
    assert [(span.text.strip(), kind) for span, kind in zip(document.spans, document.strata, strict=True)] == [
        ("sat", "user end"),
        ("<|assistant|>", "before answer"),
        ("a", "answer start"),
        ("tree", "answer end"),
    ]


KNOWN = [
    {"messages": CHAT, "attributes": {"topic": "cats", "tone": None}, "split": "eval"},
    {"messages": [*CHAT, *CHAT], "attributes": {"topic": "dogs", "tone": "sad"}, "split": "train"},
    {"messages": [*CHAT, *CHAT, *CHAT], "attributes": None, "split": None},
]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "hub"])
def test_what_a_corpus_says_of_its_chats_is_kept_and_its_splits_are_taken(tokenizer, tmp_path, monkeypatch, form):
    source = write_jsonl(tmp_path / "c.jsonl", KNOWN)
    if form == "parquet":
        source = str(tmp_path / "c.parquet")
        pq.write_table(pa.Table.from_pylist(KNOWN), source)
    elif form == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(KNOWN))
        source = "some/data"
    for share, rest in ((1e-9, "train"), (1 - 1e-9, "eval")):
        (chunk,) = prepare(tokenizer, CorpusSettings(source, first_position=0, eval_fraction=share))
        assert chunk.splits == ["eval", "train", rest], "where nothing is said, the text decides"
        said = [{name: value for name, value in d.attributes.items() if value} for d in chunk.documents]
        assert said == [{"topic": "cats"}, {"topic": "dogs", "tone": "sad"}, {}]


def test_splits_by_their_names_in_data_sets_are_taken_and_of_others_the_text_decides(tokenizer, tmp_path, caplog):
    names = ["train", "Train", "validation", "valid", "val", "dev", "Test", "eval"]
    odd = ["", 0, "test_sft", {"a": 1}, ["train"]]
    source = write_jsonl(tmp_path / "c.jsonl", [{**KNOWN[0], "split": name} for name in names + odd])
    for share, rest in ((1e-9, "train"), (1 - 1e-9, "eval")):
        caplog.clear()
        (chunk,) = prepare(tokenizer, CorpusSettings(source, first_position=0, eval_fraction=share))
        assert chunk.splits == ["train"] * 2 + ["eval"] * 6 + [rest] * 5 and chunk.counts["other_split"] == 5
        assert len(caplog.messages) == 3 and "Document 8 of the split ''" in caplog.messages[0]


@pytest.mark.parametrize(
    "wrong",
    [
        r'{"topic": "\ud800x"}',
        r'{"\udfff": 1}',
        '{"t": ' + "[" * 120 + "]" * 120 + "}",
        '{"t": ' + "9" * 400 + "}",
        '{"t": NaN}',
        '{"t": [-Infinity]}',
    ],
)
def test_attributes_that_a_store_could_not_give_back_are_refused_by_their_document(tokenizer, tmp_path, wrong):
    good = json.dumps({**KNOWN[0], "attributes": {"t": [[1, 1.5, None, True, "é\u2028"]], "u": "9" * 400}})
    odd = json.dumps({**KNOWN[0], "attributes": None}).replace('"attributes": null', f'"attributes": {wrong}')
    (tmp_path / "c.jsonl").write_text(good + "\n" + odd + "\n")
    settings = CorpusSettings(str(tmp_path / "c.jsonl"), first_position=0)
    with pytest.raises(CorpusError, match=r"document 1, whose attributes"):
        prepare(tokenizer, settings)
    (tmp_path / "c.jsonl").write_text(good + "\n")
    assert prepare(tokenizer, settings)[0].documents[0].attributes["u"] == "9" * 400


def test_chats_of_which_the_template_drops_something_are_counted_and_some_are_named(tokenizer, tmp_path, caplog):
    chats = [{"messages": [{"role": "system", "content": "red"}, *CHAT]}] * 5 + [{"messages": CHAT}]
    settings = CorpusSettings(write_jsonl(tmp_path / "c.jsonl", chats), first_position=0)
    tokenizer.chat_template = tokenizer.chat_template.replace("in messages", "in messages if m['role'] != 'system'")
    (chunk,) = prepare(tokenizer, settings)
    assert (chunk.counts["unread"], chunk.counts["read"], chunk.counts["refused"]) == (5, 6, 0)
    assert len(caplog.messages) == 3 and "content: message 0 of" in caplog.messages[0]
    assert caplog.messages[0].startswith("Document 0: Dropped by the chat template")


def test_a_chat_that_cannot_be_read_is_left_out_but_not_all_of_them(tokenizer, tmp_path):
    broken = {"messages": [{"role": "user", "content": 7}]}
    source = write_jsonl(tmp_path / "c.jsonl", [broken, {"messages": CHAT}])
    (chunk,) = prepare(tokenizer, CorpusSettings(source, first_position=0))
    assert chunk.counts["refused"] == 1 and [document.number for document in chunk.documents] == [1]
    with pytest.raises(TranscriptError, match="content that is a int"):
        prepare(tokenizer, CorpusSettings(write_jsonl(tmp_path / "d.jsonl", [broken, broken])))
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="without a chat template"):
        prepare(plain, CorpusSettings(source))
    unknown = write_jsonl(tmp_path / "e.jsonl", [{"text": "zebras stampede"}])
    with pytest.raises(VocabularyError, match="zebras"):
        prepare(tokenizer, CorpusSettings(unknown))


def test_a_missing_column_lists_those_that_are_there(tmp_path, parquet, monkeypatch):
    jsonl = write_jsonl(tmp_path / "x.jsonl", [{"body": "a", "id": 1}])
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
    data = datasets.Dataset.from_dict({"body": ["a"], "id": [1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    for source in (jsonl, str(tmp_path / "x.parquet"), "some/data"):
        with pytest.raises(CorpusError, match=r"columns 'body', 'id'; expected the column 'text' or 'messages'"):
            open_corpus(CorpusSettings(source))
        assert texts_of(CorpusSettings(source, text_column="body")) == ["a"]
    with pytest.raises(CorpusError, match="expected the column 'nope'"):
        open_corpus(CorpusSettings(parquet, text_column="nope"))
    with pytest.raises(CorpusError, match="a text that is a int"):
        texts_of(CorpusSettings(parquet, text_column="n"))


def test_a_corpus_that_is_not_there_or_broken_is_an_error(tmp_path, monkeypatch, tokenizer, parquet):
    def fail(*_, **__):
        raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(CorpusError, match="no/such"):
        open_corpus(CorpusSettings("no/such"))
    for source in (tmp_path / "no.jsonl", tmp_path / "*.parquet.gz", "./nothing"):
        with pytest.raises(CorpusError, match="no such file"):
            open_corpus(CorpusSettings(str(source)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="a folder without such files"):
        open_corpus(CorpusSettings(str(tmp_path / "empty")))
    (tmp_path / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b')
    with pytest.raises(CorpusError, match=r"line 2: JSON that is cut or broken"):
        texts_of(CorpusSettings(str(tmp_path / "cut.jsonl")))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(CorpusError, match="cannot be read"):
        open_corpus(CorpusSettings(str(tmp_path / "cut.parquet")))
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(CorpusError, match="not UTF-8"):
        texts_of(CorpusSettings(str(tmp_path / "latin.txt")))
    with pytest.raises(CorpusError, match="kind = chat"):
        prepare(tokenizer, CorpusSettings(parquet, positions="turns"))


def test_positions_by_kind_are_spread_evenly_over_texts_and_chats(tmp_path, tokenizer):
    texts = [f"the cat sat on a mat.\n the {word} dog ran." for word in ("red", "blue")]
    settings = {"positions": "kinds", "n_positions": 6, "first_position": 2}
    source = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    (chunk,) = prepare(tokenizer, CorpusSettings(source, **settings))
    for document in chunk.documents:
        assert len(document.spans) == 6 and all(span.index >= 2 for span in document.spans)
        kinds = dict(zip((span.text for span in document.spans), document.strata, strict=True))
        assert kinds.get("\n") == "line break" and kinds.get(".") == "sentence end"
        assert set(document.strata) == {"content word", "function word", "sentence end", "line break"}
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}])
    (chunk,) = prepare(tokenizer, CorpusSettings(source, **settings | {"n_positions": 50, "max_tokens": 14}))
    for document in chunk.documents:
        assert 0 not in (span.index for span in document.spans), "the first token is an outlier"
        assert {"before answer", "answer start", "template token", "prompt content word"} <= set(document.strata)
        assert all(span.text.startswith("<|") == (kind in ("template token", "before answer"))
                   for span, kind in zip(document.spans, document.strata, strict=True))  # fmt: skip
    again = prepare(tokenizer, CorpusSettings(source, **settings | {"max_tokens": 14}))
    assert again == prepare(tokenizer, CorpusSettings(source, **settings | {"max_tokens": 14}))
    assert again != prepare(tokenizer, CorpusSettings(source, **settings | {"max_tokens": 14}), seed=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "poem"},
        {"positions": "first"},
        {"positions": "every:0"},
        {"n_positions": 0},
        {"first_position": -1},
        {"eval_fraction": 0.0},
        {"eval_fraction": 1.0},
        {"n_eval": 5},
        {"n_eval": 9, "n_documents": 9},
        {"n_documents": 0},
        {"max_tokens": 0},
    ],
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ArgumentError, match="correct it where it is given"):
        CorpusSettings("some/data", **changes)
    assert CorpusSettings("some/data", n_eval=5, n_documents=50).eval_share == 0.1
