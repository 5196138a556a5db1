"""The token view: whole texts, marked tokens that lead to their cards, nothing that a model wrote taken for markup."""

from __future__ import annotations

import base64
import hashlib
import re
from itertools import combinations

import pytest

from nla.errors import visible
from nla.pair.explanations import Explanation, Explanations, Trust
from nla.text.claims import claims
from nla.text.tokens import Span
from nla.views import figures, pages, tokens
from nla.views.pages import spelled_out
from tests.helpers import colours
from tests.helpers.pages import MARKUP, ODD, Markup

TRUSTS = [Trust.of(0.9, 0.7, 0.2), Trust.of(0.6, 0.5, 0.1), Trust.of(0.2, 0.1, 0.0)]


def explanations(text: str, places: list[tuple[int, int]], samples: list[str], stratum: str = "word") -> Explanations:
    """Explanations of a text's tokens at these places, of all three levels of trust in turn."""
    items = [
        Explanation(
            samples,
            [True] * len(samples),
            [0.9] * len(samples),
            TRUSTS[number % 3],
            Span(number, text[start:end], start, end, number),
            0,
            stratum,
        )
        for number, (start, end) in enumerate(places)
    ]
    return Explanations(items, [text], "resid_post.1")


def passage(html: str) -> str:
    """What stands in the texts of a view."""
    return "".join(Markup(part).text for part in re.findall(r'<p class="passage">.*?</p>', html, re.DOTALL))


def test_a_page_holds_its_own_markup_only_and_its_policy_forbids_the_rest() -> None:
    text = explanations("so it is", [(0, 2), (2, 5), (5, 8)], ["A cat.", "A cat. A dog."]).to_html(
        "title", ["a remark"]
    )
    markup = Markup(text)
    markup.check()
    assert "a remark" in markup.text and "<script" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]  # type: ignore[index]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]  # type: ignore[index]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in style and "@import" not in style and not re.search(r"\b(https?:)?//\w", text)


@pytest.mark.parametrize("bad", [*MARKUP, *ODD, "\"'><script>alert(1)</script>", "' onmouseover='x", "a\n<b>\n"])
def test_no_text_of_a_model_changes_the_markup_wherever_it_is_shown(bad: str) -> None:
    """The same structure, tag by tag, as of a harmless text in its place; and the text itself is all there."""

    def both(text: str) -> list[Markup]:
        start = len("so ")
        given = explanations(f"so {text} it", [(0, 2), (start, start + len(text))], [f"It is {text} here."], text)
        return [Markup(given.to_html(text, [text])), Markup(given._repr_html_())]

    for hostile, harmless in zip(both(bad), both("cat"), strict=True):
        hostile.check()
        n_more_claims = 2 * (len(claims(f"It is {bad} here.")) - 1)
        assert hostile.tags["li"] == harmless.tags["li"] + n_more_claims
        del hostile.tags["li"], harmless.tags["li"]
        assert hostile.tags == harmless.tags and hostile.attributes == harmless.attributes
        assert spelled_out(bad).replace("\n", "⏎") in hostile.text and spelled_out(bad) in hostile.text
        said = claims(f"It is {bad} here.")[0]
        assert hostile.tips == [f"{spelled_out(said)} ({level} trust)" for level in ("high", "medium")]


def test_a_text_is_whole_and_in_its_order_whatever_tokens_are_marked() -> None:
    text = "so  it is\nhere, and there"
    words = [match.span() for match in re.finditer(r" ?\w+|[^\w ]", text)]
    for places in (words, words[::-1], words[2:3], [], [(0, len(text)), *words]):
        shown = passage(tokens.page([text], explanations(text, places, ["x"])._notes(), "", ""))
        assert shown.replace("⏎", "").replace("″", "") == (text if places else "")


def test_a_token_leads_to_its_card_and_back_and_shows_its_first_claim() -> None:
    given = explanations("so it", [(0, 2), (2, 5)], ["A dog. A cat.", "A cat.", "a  cat! A bird."])
    markup = Markup(given.to_html())
    for number in (1, 2):
        assert markup.links.count(f"#c{number}") == 1 == markup.links.count(f"#t{number}")
    assert markup.tips == ["A cat. (high trust)", "A cat. (medium trust)"]
    assert given._notes()[0].claims == [("A cat.", 3), ("A dog.", 1), ("A bird.", 1)]
    assert all(f"{n} of 3" in markup.text for n in (1, 3))


def test_a_character_of_several_tokens_is_shown_once() -> None:
    text = "so \U0001f469 it"
    spans = [Span(9, text[3], 3, 4, n, False, n, 3) for n in (1, 2, 3)]
    given = Explanations([Explanation(["x"], [True], [0.5], TRUSTS[0], span, 0) for span in spans], [text])
    assert passage(given.to_html()) == "so \U0001f4692/33/3 it"


def test_added_tokens_and_vectors_of_no_known_text_have_their_cards() -> None:
    added = Explanation(["x"], [True], [0.5], TRUSTS[0], Span(1, "", 0, 0, 0, True), 0)
    unknown = Explanation(["y"], [True], [0.5], TRUSTS[0])
    markup = Markup(Explanations([unknown, added], ["so it"]).to_html())
    markup.check()
    assert markup.links.count("#c1") == 1 == markup.links.count("#c2")
    assert passage(Explanations([unknown, added], ["so it"]).to_html()) == "∅so it ∅"


def test_a_sample_that_is_cut_off_or_empty_says_so() -> None:
    one = Explanation(["", "It is"], [True, False], [0.5, 0.5], TRUSTS[2], Span(1, "so", 0, 2, 0), 0)
    text = Markup(Explanations([one], ["so"]).to_html()).text
    assert "nothing" in text and "not a whole explanation" in text


def test_a_notebook_shows_the_first_tokens_and_says_how_many_it_leaves_out() -> None:
    text = "x" * 310
    given = explanations(text, [(n, n + 1) for n in range(310)], ["A cat."])
    markup = Markup(given._repr_html_())
    assert markup.tags["code"] == tokens.N_IN_NOTEBOOK == 300 and "10 more are not shown here" in markup.text
    assert Markup(given.to_html()).tags["code"] == 310
    assert "more are not shown" not in given[:300]._repr_html_()


def test_links_of_two_views_in_one_notebook_do_not_meet() -> None:
    views = [explanations(text, [(0, 2)], ["A cat."])._repr_html_() for text in ("so it", "so is")]
    markup = Markup("".join(views))
    markup.check()  # no id stands twice, and each link has its own


def test_trust_is_told_apart_without_any_kind_of_cone_and_text_is_legible() -> None:
    css = pages.css("tokens.css")
    for theme in colours.themes(css).values():
        levels = [theme[level] for level in tokens.LEVELS]
        for one, other in combinations(levels, 2):
            assert all(colours.distance(one, other, eyes) > 20 for eyes in colours.SEEN_BY)
        for level in levels:
            assert colours.contrast(level, theme["card"]) >= 3  # WCAG 1.4.11
            assert colours.contrast(theme["ink"], colours.mixed(level, theme["card"], 0.24)) >= 4.5  # 1.4.3
        assert all(colours.contrast(theme[name], theme["card"]) >= 4.5 for name in ("ink", "soft", "link"))
    light = colours.themes(css)["light"]
    assert {level: light[level] for level in tokens.LEVELS} == figures.COLOURS
    assert colours.distance("#a03030", "#30a030", "all cones") > 80  # what a tenth of men cannot tell apart is found
    assert colours.distance("#a05030", "#707030", "deuteranopia") < 20


def test_trust_shows_without_colour_too() -> None:
    """Each level has its own line and its own filling."""
    css = pages.css("tokens.css")
    fillings = re.findall(r"\.(high|medium|low) \{ --c: var\(--\1\); --filled: (\d+)%", css)
    assert len({filling for _, filling in fillings}) == 3 == len(fillings)
    assert re.search(r"\.token\.medium \{ border-bottom-style: dashed", css)
    assert re.search(r"\.token\.low \{ border-bottom-style: dotted", css)


def test_activations_are_shown_as_their_texts(pair, texts) -> None:
    acts = pair.read(texts)
    markup = Markup(acts._repr_html_())
    markup.check()
    assert passage(acts._repr_html_()).replace("⏎", "") == "".join(texts)
    assert markup.tags["code"] == len(acts) and all(tip.startswith("norm ") for tip in markup.tips)
    assert visible(repr(acts)) in markup.text
