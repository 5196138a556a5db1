"""1,000 malformed transcript files: each a typed error, or text that is escaped on the page. Never a crash."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from pyarrow import Table
from pyarrow.parquet import write_table

from nla.audit.rubric import parse_rubric
from nla.errors import NLAError, TranscriptError
from nla.transcripts.files import read_file
from nla.transcripts.messages import Transcript
from nla.transcripts.rendering import render
from tests.helpers.pages import MARKUP, ODD, Markup, whole_message_page
from tests.helpers.tiny import make_tokenizer

N_FILES = 1_000
MAX_MB = 0.05
ROLES: list[Any] = ["narrator", "", None, 3, ["user"], {"a": 1}, "USER", "human", "tool", "developer", "system\n"]
CONTENTS: list[Any] = [None, "", [], {}, 3, True, ["x", 3], [{"type": "text"}], [{"type": 3, "text": "x"}], [[]]]
CONTENTS += [[{"type": "image_url", "image_url": {"url": "javascript:alert(1)"}}], float("nan"), "the cat"]
SHAPES: list[Any] = [[], {}, None, 3, "text", {"messages": None}, {"messages": {}}, {"messages": "x"}, [[]], [None]]
SHAPES += [{"events": "x", "metadata": {}}, {"events": [3, {}], "metadata": {}}, {"metadata": {}, "events": []}]
SHAPES += [{"samples": 3, "messages": [3]}, {"messages": [{}], "id": ["x"]}, [{"messages": 3}, {"messages": []}]]


def words(draw: random.Random) -> str:
    return " ".join(draw.choice(["the cat", "it is here", "so"]) for _ in range(draw.randint(1, 6)))


def conversation(draw: random.Random) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": words(draw)} for n in range(draw.randint(1, 5))]


def malformed(draw: random.Random, kind: str) -> bytes:
    """One file's bytes of a kind."""
    messages: Any = conversation(draw)
    one = draw.randrange(len(messages))
    if kind == "cut":
        text = json.dumps({"messages": messages})
        return text[: draw.randrange(1, len(text))].encode()
    if kind == "wrong roles":
        messages[one]["role"] = draw.choice(ROLES)
    elif kind == "odd contents":
        messages[one]["content"] = draw.choice(CONTENTS)
    elif kind == "odd unicode":
        messages[one]["content"] += draw.choice(ODD)
        messages[one]["name"] = draw.choice(ODD)
    elif kind == "markup":
        messages[one]["content"] += draw.choice(MARKUP) + words(draw)
        return json.dumps({"id": draw.choice(MARKUP), "model": draw.choice(MARKUP), "messages": messages}).encode()
    elif kind == "shapes":
        return json.dumps(draw.choice(SHAPES)).encode()
    elif kind == "huge":
        messages[one]["content"] = draw.choice(["the cat " * 20_000, "x" * 100_000])
    elif kind == "empty":
        return draw.choice([b"", b"\n", b" \t\n", b"\xef\xbb\xbf", b"{}", b"[]", b"null"])
    elif kind == "bytes":
        return bytes(draw.randrange(256) for _ in range(draw.randint(1, 200)))
    elif kind == "calls":
        call = draw.choice([3, [3], [{}], [{"function": 3}], [{"function": {"name": draw.choice(MARKUP)}}], "x"])
        messages[one]["tool_calls"] = call
    elif kind == "deep":
        return (b"[" if draw.random() < 0.5 else b'{"a":') * draw.choice([900, 5_000, 40_000])
    elif kind == "spliced":
        text = bytearray(json.dumps({"messages": messages}).encode())
        for _ in range(draw.randint(1, 8)):
            text[draw.randrange(len(text))] = draw.randrange(256)
        return bytes(text)
    return json.dumps(messages).encode("utf-8", "surrogatepass")


KINDS = ("cut", "wrong roles", "odd contents", "odd unicode", "markup", "shapes", "huge", "empty", "bytes", "calls")
KINDS += ("deep", "spliced")


def test_a_thousand_malformed_files_give_typed_errors_or_escaped_text(tmp_path: Path) -> None:
    draw, tokenizer = random.Random(0), make_tokenizer()
    tokenizer.unk_token = None  # a tokenizer that takes every word, as real ones do
    counts, kept = Counter(), []
    for number in range(N_FILES):
        kind = KINDS[number % len(KINDS)]
        path = tmp_path / f"{number}.{draw.choice(['json', 'json', 'jsonl', 'txt'])}"
        path.write_bytes(malformed(draw, kind))
        for found in read_file(path, MAX_MB):
            if isinstance(found, TranscriptError):
                counts["refused"] += 1
                assert found.got and found.fix and "\x1b" not in str(found)
                continue
            try:
                render(tokenizer, found)
            except NLAError:
                counts["refused by the template"] += 1
            else:
                counts["read"] += 1
            kept.append(Transcript(f"{number} {found.id}", found.messages, found.model, found.source))
    assert counts["refused"] > 500 and counts["read"] > 100
    rubric = parse_rubric({"name": "own", "title": MARKUP[0], "looks_for": "x", "match": {"regex": ["."]}})
    for text in (MARKUP[1] + ODD[0], MARKUP[4]):
        page = whole_message_page(kept, rubric, text)
        markup = Markup(page)
        markup.check()
        assert "alert(1)" in markup.text and "<script>alert(1)" in markup.text  # there, as text
        assert "\u202e" not in page and "\x1b" not in page


def test_damaged_tables_give_typed_errors(tmp_path: Path) -> None:
    """Parquet with changed or missing bytes, also inside its texts; CSV with loose quotes, fields and bytes."""
    draw, counts = random.Random(1), Counter()
    rows = [{"id": f"w{n}", "conversation": conversation(draw)} for n in range(40)]
    buffer = io.BytesIO()
    write_table(Table.from_pylist(rows), buffer, compression="none")
    csv = "id,prompt,completion\n" + "".join(f'{n},"the cat, {n}",it is\n' for n in range(20))
    for number in range(300):
        data = bytearray(buffer.getvalue() if number % 2 else csv.encode())
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / f"{number}.{'parquet' if number % 2 else 'csv'}"
        path.write_bytes(data[: draw.randrange(1, len(data))] if draw.random() < 0.2 else data)
        for found in read_file(path):
            counts[type(found).__name__] += 1
            assert isinstance(found, Transcript) or str(path) in found.got
    assert counts["TranscriptError"] > 200 and counts["Transcript"] > 200
