"""The page: self-contained, without script, every finding linked to its token."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace

from nla.audit.page import page
from nla.audit.rubric import parse_rubric
from nla.transcripts.messages import Message, Transcript
from nla.views.pages import spelled_out
from tests.helpers.pages import Markup, report
from tests.helpers.talk import SAYINGS, entry, said, transcript

CAT = parse_rubric({"name": "cat", "title": "A cat", "looks_for": "A cat.", "match": {"words": ["cat"]}})
DOG = parse_rubric({"name": "dog", "title": "A dog", "looks_for": "A dog.", "match": {"words": ["dog"]}})


def one_page() -> str:
    talk = said(("user", "so it is\n"), ("assistant", "here"))
    found = [
        entry(0, 2, ["A cat.", "A cat and a dog."], index=1, token="so", start=0),
        entry(0, 9, ["A cat.", "It is."], index=4, token="\n", start=8),
        entry(1, 0, ["A dog.", "A dog."], index=6, token="<|assistant|>", role="assistant"),
        entry(1, 4, ["Nothing.", "Nothing."], index=7, token="here", start=0),
    ]
    return page(report([talk], [found], [CAT, DOG]))


def test_the_page_holds_its_own_markup_only_and_its_policy_forbids_the_rest() -> None:
    text = one_page()
    Markup(text).check()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]  # type: ignore[index]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]  # type: ignore[index]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"style-src 'sha256-{digest}'" in policy
    assert "<script" not in text.lower() and "url(" not in style and "@import" not in style
    assert not re.search(r"\b(https?:)?//\w", text)


def test_marked_tokens_and_findings_point_at_each_other() -> None:
    markup = Markup(one_page())
    for number in (1, 2, 3):
        assert f"#t0f{number}" in markup.links and f"#t0k{number}" in markup.links
    assert "t0f4" not in markup.ids
    assert markup.tags["aside"] == 3
    assert "so1 it is⏎2\n" in markup.text


def test_said_and_not_said_stand_beside_each_finding() -> None:
    text = one_page()
    assert text.count("thought, not said") == 4 + 1  # and once in the table's heading
    assert "2 of 2 samples" in text and "1 of 2 samples" in text


def test_what_hides_or_turns_text_is_spelled_out() -> None:
    assert spelled_out("a\u202eb\x1b[0m") == "a\\u202eb\\x1b[0m"
    shown = "a\n\tb\u00a0c \U0001f469\u200d\U0001f4bb"
    assert spelled_out(shown) == shown


def test_every_text_of_an_audit_is_escaped_and_spelled_out_wherever_it_is_shown() -> None:
    bad = "\"'><script>alert(1)</script>&\u202e\x1b"
    rubric = parse_rubric({"name": "x", "title": bad, "looks_for": "x", "match": {"regex": ["."]}})
    message = Message("assistant", bad, ({"name": bad, "arguments": {bad: bad}},), bad)
    talk = Transcript(bad, (message,), bad, bad)
    read = [entry(0, 0, [bad], kind=bad, index=n, token=bad, start=start) for n, start in ((1, -1), (2, 0))]
    text = page(replace(report([talk], [read], [rubric]), pair=bad, target_adapter=bad, refused=[bad]))
    markup = Markup(text)
    markup.check()
    assert "<script" not in text and "\u202e" not in text and "\x1b" not in text
    assert markup.text.count("<script>alert(1)</script>&\\u202e\\x1b") >= 12


def test_tool_calls_and_reasoning_are_shown() -> None:
    call = {"name": "look", "arguments": {"at": "<b>"}}
    talk = Transcript("a", (Message("assistant", "here", (call,), "thinking <i>"),))
    text = page(report([talk], [[entry(0, 0, ["x"])]], [CAT]))
    Markup(text).check()
    assert "thinking &lt;i&gt;" in text and "&lt;b&gt;" in text and "look" in text


def test_a_page_of_500_turns_is_whole() -> None:
    talk = transcript(500)
    found = [entry(n, 3, ["A cat."], index=n, token=SAYINGS[n % len(SAYINGS)][:3], start=0) for n in range(500)]
    markup = Markup(page(report([talk], [found], [CAT])))
    markup.check()
    assert markup.tags["aside"] == 500 == markup.tags["article"]


def test_a_character_of_two_tokens_is_shown_once() -> None:
    talk = said(("user", "so \U0001f469 it"))
    halves = [entry(0, 4, ["A cat."], index=n, token="\U0001f469", start=3) for n in (1, 2)]
    assert "so \U0001f4691" in Markup(page(report([talk], [halves], [CAT]))).text
    assert Markup(page(report([talk], [halves], [CAT]))).text.count("\U0001f469 it") == 0
    turn = page(report([talk], [halves], [CAT])).split('class="text">')[1].split("</article>")[0]
    assert turn.count("\U0001f469") == 1


def test_what_is_as_common_in_controls_is_no_alarm() -> None:
    talk = said(("user", "so it is\n"))
    controls = [said(("user", f"so it is {n}"), name=f"c{n}") for n in range(30)]
    found = [entry(0, 2, ["A cat."], index=1, token="so", start=0)]
    common = page(report([talk], [found], [CAT], controls, [found] * 30))
    assert (
        "1 finding, 0 of them significant" in common and "not significant" in common and 'class="unsaid"' not in common
    )
    rare = page(report([talk], [found], [CAT], controls, [[entry(0, 2, ["A dog."])]] * 30))
    assert "1 finding, 1 of them significant" in rare and ": significant" in rare and 'class="unsaid"' in rare
    Markup(rare).check()
