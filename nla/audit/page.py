"""The audit as one HTML page: transcripts with marked tokens, findings beside them.

The page holds no script and fetches nothing, and its policy forbids both; all that comes from files or models is
escaped, with control and direction marks spelled out.
"""

from __future__ import annotations

import base64
import hashlib
import html
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from nla.audit.findings import NOT_SAID, PositionScore
from nla.audit.report import AuditReport
from nla.text.markdown import number
from nla.transcripts.messages import Message, Transcript

N_COLOURS = 6
N_LISTED = 40
"""Transcripts up to which their list is open."""
_JOINER = "\u200d"
_TEMPLATE_TOKEN = -1


def safe(text: str) -> str:
    """A text as it may stand in HTML: escaped, and with what could hide or turn around text spelled out.

    >>> safe("<b>\\u202e</b>")
    '&lt;b&gt;\\\\u202e&lt;/b&gt;'
    """
    kept = [letter if _is_shown(letter) else repr(letter)[1:-1] for letter in text]
    return html.escape("".join(kept), quote=True)


def _is_shown(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\t" + _JOINER or unicodedata.category(letter) == "Zs"


def page(report: AuditReport) -> str:
    """The whole page."""
    audit = report.audit
    colours = {rubric.name: place for place, rubric in enumerate(audit.rubrics)}
    style = Path(__file__).with_name("page.css").read_text("utf-8") + _filters(len(colours))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    marked: dict[str, dict[int, list[PositionScore]]] = {}
    for row in sorted(audit.findings, key=lambda row: colours[row.rubric]):
        marked.setdefault(row.transcript, {}).setdefault(row.entry.index, []).append(row)
    tokens = {reading.transcript: reading.n_tokens for reading in audit.readings}
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Audit of {len(audit.transcripts)} transcripts</title><style>{style}</style></head><body>",
        '<a class="skip" href="#transcripts">Skip to the transcripts</a>',
        _header(report, marked),
        '<main id="transcripts">',
    ]
    for place, transcript in enumerate(audit.transcripts):
        found = marked.get(transcript.id, {})
        parts.append(_transcript(report, place, transcript, found, colours, tokens[transcript.id]))
    parts.append(
        "</main><footer><p>Explanations are what the encoder writes for an activation: they can be fluent and wrong. "
        "Trust says how well an explanation reconstructs the activation and how much its samples agree, not that it "
        "is true.</p></footer></body></html>"
    )
    return "\n".join(parts)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _filters(n_rubrics: int) -> str:
    """Rules that hide what a chosen filter leaves out; without ``:has`` everything stays shown.

    Cards and the template's tokens disappear; a message's own tokens stay and lose their mark.
    """
    chosen = [(f"#only{place}", f".of{place}") for place in range(n_rubrics)] + [
        ("#unsaid", ".hid"),
        ("#firm", ".significant"),
    ]
    return "".join(
        f"body:has({box}:checked) :is(.card, .mark.template):not({kept}) {{ display: none; }}\n"
        f"body:has({box}:checked) .mark:not({kept}) {{ background: none; border-color: transparent; }}\n"
        f"body:has({box}:checked) .mark:not({kept}) sup {{ display: none; }}\n"
        for box, kept in chosen
    )


def _header(report: AuditReport, marked: dict[str, dict[int, list[PositionScore]]]) -> str:
    audit = report.audit
    about = [f"{report.pair} at {report.point}", f"{report.samples} explanations of each position"]
    about += [f"positions: {report.positions}"]
    about += [f"target adapter {report.target_adapter}"] if report.target_adapter else []
    about += [f"control target {report.control_target}"] if report.control_target else []
    head = "".join(f'<th scope="col">{safe(name)}</th>' for name in report.rubric_header())
    body = ""
    for cells in report.rubric_cells():
        first, *rest = map(safe, cells)
        body += f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
    warning = "".join(f'<p class="warn">{safe(line)}</p>' for line in report.notes())
    choices = '<label><input type="radio" name="only" id="all" checked> all rubrics</label>'
    for place, rubric in enumerate(audit.rubrics):
        choices += f'<label><input type="radio" name="only" id="only{place}"> {safe(rubric.title)}</label>'
    choices += '<label><input type="checkbox" id="unsaid"> thought and not said only</label>'
    if report.controlled:
        choices += '<label><input type="checkbox" id="firm"> significant only</label>'
    opening = "<details open>" if len(audit.transcripts) <= N_LISTED else "<details>"
    significant = (
        f", {sum(bool(row.significant) for row in audit.findings)} of them significant" if report.controlled else ""
    )
    links = ""
    for place, transcript in enumerate(audit.transcripts):
        n_found = len(marked.get(transcript.id, {}))
        links += f'<li><a href="#t{place}">{safe(transcript.id)}</a> <span class="count">{n_found}</span></li>'
    return (
        f"<header><h1>Audit: {_count(len(audit.transcripts), 'transcript')}, "
        f"{_count(len(audit.findings), 'finding')}{significant}</h1>"
        f'<p class="about">{safe("; ".join(about))}</p>{warning}'
        f'<p class="about">{safe(report.legend())}</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<fieldset><legend>Show findings of</legend>{choices}</fieldset>"
        f'<nav aria-label="Transcripts">{opening}'
        f"<summary>Transcripts, and positions with findings</summary><ul>{links}</ul></details></nav></header>"
    )


def _transcript(
    report: AuditReport,
    place: int,
    transcript: Transcript,
    found: dict[int, list[PositionScore]],
    colours: dict[str, int],
    n_tokens: int,
) -> str:
    facts = [transcript.source] if transcript.source else []
    facts += [f"model {transcript.model}"] if transcript.model else []
    facts += [_count(len(transcript.messages), "message"), _count(n_tokens, "token")]
    facts += [f"{_count(len(found), 'position')} with findings"]
    numbers = {index: order for order, index in enumerate(sorted(found), start=1)}
    by_message: dict[int, list[int]] = {}
    for index in sorted(found):
        by_message.setdefault(found[index][0].entry.message, []).append(index)
    turns = []
    for number_, message in enumerate(transcript.messages):
        marks = [(numbers[index], found[index]) for index in by_message.get(number_, [])]
        cards = "".join(_card(report, place, order, rows, colours) for order, rows in marks)
        turns.append(
            f'<div class="turn {message.role}" id="t{place}m{number_}">'
            f'<article class="message">{_message(place, number_, message, marks, colours)}</article>'
            f'<div class="beside">{cards}</div></div>'
        )
    title = f'<h2>{safe(transcript.id)}</h2><p class="sub">{safe("; ".join(facts))}</p>'
    if found:
        jumps = " ".join(f'<a href="#t{place}f{order}">{order}</a>' for order in numbers.values())
        title += f'<nav class="jump" aria-label="findings of this transcript">Findings: {jumps}</nav>'
    return f'<section id="t{place}">{title}{"".join(turns)}</section>'


Marks = Sequence[tuple[int, list[PositionScore]]]


def _message(place: int, number_: int, message: Message, marks: Marks, colours: dict[str, int]) -> str:
    """Who speaks, with marked tokens of the template, and what was said, with marked tokens of its own."""
    outside = [(order, rows) for order, rows in marks if rows[0].entry.start == _TEMPLATE_TOKEN]
    inside = sorted((rows[0].entry.start, order, rows) for order, rows in marks if rows[0].entry.start >= 0)
    chips = [_mark(place, order, rows, colours, rows[0].entry.token) for order, rows in outside]
    text, last = "", 0
    for start, order, rows in inside:
        # Two tokens can share a character, each with some of its bytes: it is shown once.
        end = max(last, min(start + len(rows[0].entry.token), len(message.content)))
        start = max(start, last)
        text += safe(message.content[last:start]) + _mark(place, order, rows, colours, message.content[start:end])
        last = end
    text += safe(message.content[last:])
    reasoning = calls = ""
    if message.reasoning:
        shown = safe(message.reasoning)
        reasoning = f'<details><summary>reasoning</summary><div class="more">{shown}</div></details>'
    if message.calls:
        tail = message.visible[message.content_start + len(message.content) :].strip("\n")
        calls = f'<div class="more" aria-label="tool calls">{safe(tail)}</div>'
    who = f'<div class="who"><b>{message.role}</b> <a href="#t{place}m{number_}">{number_}</a> {" ".join(chips)}</div>'
    return f'{who}{reasoning}<div class="text">{text}</div>{calls}'


def _classes(rows: Sequence[PositionScore], colours: dict[str, int]) -> str:
    """Colour of the first rubric, and for the filters all of them, and whether one is not said, and one significant."""
    names = [f"r{colours[rows[0].rubric] % N_COLOURS}", *(f"of{colours[row.rubric]}" for row in rows)]
    names += ["hid"] if any(row.said == NOT_SAID for row in rows) else []
    return " ".join(names + (["significant"] if any(row.significant for row in rows) else []))


def _mark(place: int, order: int, rows: Sequence[PositionScore], colours: dict[str, int], token: str) -> str:
    shape = "mark template" if rows[0].entry.start == _TEMPLATE_TOKEN else "mark"
    text = safe(token)
    # A marked line break stays one, after the mark, and is shown by a sign in it.
    breaks = "\n" * text.count("\n") if shape == "mark" else ""
    text = text.replace("\n", "⏎")
    label = safe(f"finding {order}: {', '.join(row.rubric for row in rows)}")
    return (
        f'<a class="{shape} {_classes(rows, colours)}" id="t{place}k{order}" href="#t{place}f{order}" '
        f'title="{label}" aria-label="{label}">{text}<sup>{order}</sup></a>{breaks}'
    )


def _card(report: AuditReport, place: int, order: int, rows: Sequence[PositionScore], colours: dict[str, int]) -> str:
    entry = rows[0].entry
    titles = {rubric.name: rubric.title for rubric in report.audit.rubrics}
    items = ""
    for row in rows:
        link = ", " if row.said == NOT_SAID else " and "
        # What is as common in controls is no alarm.
        colour = "figures" if row.significant is False else "unsaid" if row.said == NOT_SAID else "issaid"
        said = f'<span class="{colour}">thought{link}{row.said}</span>'
        value = f" ({safe(row.judged.value)}, written: {safe(row.judged.written or '–')})" if row.judged.value else ""
        figures = f"{sum(row.judged.shown)} of {len(row.judged.shown)} samples"
        if row.q is not None:
            figures += f"; in controls {number(row.control_rate)} (n = {row.n_controls}); q = {row.q:.3f}"
            figures += ": significant" if row.significant else ": not significant"
        items += f'<dt>{safe(titles[row.rubric])}</dt><dd>{said}{value} <span class="figures">{figures}</span></dd>'
    listed = ""
    for sample, text in enumerate(entry.texts):
        shown = any(row.judged.shown[sample] for row in rows)
        opening = '<li class="shown">' if shown else "<li>"
        listed += f"{opening}{safe(text) or '<i>nothing</i>'}</li>"
    token = safe(entry.token).replace("\n", "⏎") or "∅"
    trust = f"trust {entry.trust.level}: cosine {number(entry.trust.cosine)}, agreement "
    trust += f"{number(entry.trust.agreement)}, margin {number(entry.trust.margin, sign=True)}"
    return (
        f'<aside class="card {_classes(rows, colours)}" id="t{place}f{order}" aria-label="finding {order}">'
        f'<h4><a href="#t{place}k{order}">{order}</a> <code>{token}</code> '
        f'<span class="figures">{safe(entry.kind)}; {trust}</span></h4>'
        f"<dl>{items}</dl><ol>{listed}</ol></aside>"
    )
