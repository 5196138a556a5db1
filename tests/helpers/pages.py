"""A page of an audit that needs no model, hostile texts, and a reader that says what markup a page holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser

from nla.audit.findings import Evidence, Matcher, score_evidence
from nla.audit.page import page
from nla.audit.reading import Entry, Reading
from nla.audit.report import AuditReport
from nla.audit.rubric import Rubric
from nla.audit.run import Audit
from nla.transcripts.messages import Transcript
from tests.helpers.talk import entry, heard

TAGS = {
    "html", "head", "meta", "title", "style", "body", "a", "header", "h1", "h2", "h4", "p", "div", "table", "thead",
    "tbody", "tr", "th", "td", "fieldset", "legend", "label", "input", "nav", "details", "summary", "ul", "li", "span",
    "main", "section", "article", "b", "sup", "aside", "code", "dl", "dt", "dd", "ol", "i", "footer",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "href", "id", "scope", "type", "checked", "open",
    "title", "aria-label", "data-tip",
}  # fmt: skip
MARKUP = [
    "<script>alert(1)</script>", "</style><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>", '"><svg/onload=alert(1)>', "<!-- ", "</article></section>", "<b>the cat</b>",
    "&lt;script&gt;", "<iframe srcdoc='<script>alert(1)</script>'>", "]]>", "<|end|><|assistant|>", "{{ 7 * 7 }}",
]  # fmt: skip
"""Texts that would be markup where they are not escaped."""
ODD = [
    "\u202egnirts", "\x1b[31mred", "\ufeff", "\u200b\u200d", "e\u0301" * 50, "\U0001f469\u200d\U0001f4bb", "\x07",
    "\ud800", "\udfff\ud800", "a\x00b", "\ufffe", "\r\n\r", "\u2028", "\ue000", "ﷺ", "\x85",
]  # fmt: skip
"""Texts that would hide or turn what stands around them."""


class Markup(HTMLParser):
    """Counts tags, and keeps attributes, links, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tips: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name == "href"]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.tips += [value or "" for name, value in attrs if name == "data-tip"]

    def handle_data(self, data: str) -> None:
        self.text += data

    def check(self) -> None:
        """Fail if there is anything but the page's own markup, or a link that leaves it."""
        assert set(self.tags) <= TAGS, set(self.tags) - TAGS
        assert self.attributes <= ATTRIBUTES, self.attributes - ATTRIBUTES
        assert all(link.startswith("#") and link[1:] in self.ids for link in self.links)
        assert len(self.ids) == len(set(self.ids))


def report(
    transcripts: Sequence[Transcript],
    entries: Sequence[Sequence[Entry]],
    rubrics: Sequence[Rubric],
    controls: Sequence[Transcript] = (),
    control_entries: Sequence[Sequence[Entry]] = (),
) -> AuditReport:
    """The report of an audit in which these entries were read."""
    ours, theirs = (
        Evidence(
            some, [Reading(talk.id, "key", 9, 0, tuple(e)) for talk, e in zip(some, read, strict=True)], heard(some)
        )
        for some, read in ((transcripts, entries), (controls, control_entries))
    )
    scores = score_evidence(ours, theirs if controls else None, Matcher(rubrics))
    readings = list(ours.readings)
    audit = Audit(
        list(transcripts), readings, list(controls), list(rubrics), scores.positions, scores.transcripts, scores.rubrics
    )  # fmt: skip
    return AuditReport(audit, "pair", "target", "resid_post.1", "structure", 1, None, None, [], 0, 0, 0)


def whole_message_page(transcripts: Sequence[Transcript], rubric: Rubric, text: str) -> str:
    """A page on which the first characters of every message, and a token of the template, are findings of ``text``."""
    entries = []
    for each in transcripts:
        found = [entry(0, 0, [text], index=0, token=text[:9])]
        for number, message in enumerate(each.messages):
            token = message.content[:5]
            if token:
                found.append(entry(number, len(token), [text], index=number + 1, token=token, start=0))
        entries.append(found)
    return page(report(transcripts, entries, [rubric]))
