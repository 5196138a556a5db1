"""Adversaries and baselines: readers without the activation, or with another one, judged on the same items.

An adversary reads the visible text. One that knows the rule (the target itself) scores near 1 wherever the text decides
the latent: it is reported as it is, and the counterfactual tells it from a reader of activations. The confabulator
guesses from the text and lets the decoder, which is given the activation to compare with, pick the best guess.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nla.eval.adversaries import bag_of_words, closest_texts, text_lm_claims
from nla.eval.couplet_items import RhymeItem, documents
from nla.eval.explainers import Reader, encoder_reader
from nla.eval.families.mention import MentionScore, score, score_texts
from nla.eval.target import Target, last_word
from nla.organisms.couplets import world
from nla.stats import derangement

if TYPE_CHECKING:
    from nla.autoencoder import NLA

TEXT_LM = "text-only LM (the target itself)"
OUTSIDER = "outsider (knows rhymes, guesses)"
BAG = "bag of words"
N_CONFABULATIONS = 10
CONFABULATOR = f"confabulator ({N_CONFABULATIONS} guesses, the decoder picks by the activation)"


def text_lm(target: Target) -> Reader:
    """The target continues the visible text greedily; the word that its line ends on is its claim about the plan."""

    def read_text(items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"]) -> list[str]:
        def claim(row: int, line: str) -> str:
            return world.explanation(items[row].couplet, items[row].span, last_word(line))

        return text_lm_claims(target, [item.prompt for item in items], claim)

    return read_text


def describer(notice: float, seed: int = 0) -> Reader:
    """The warm start's describer: sees the rule with probability ``notice``, otherwise guesses within the rhymes."""

    def describe(items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"]) -> list[str]:
        rng = random.Random(seed)
        return [world.describe(item.couplet, item.span, rng, notice) for item in items]

    return describe


def plan_classifier(n_fit: int = 4000, seed: int = 0) -> Reader:
    """The bag of words, from the visible text to the plan, fitted on other documents."""
    couplets, model = documents(n_fit, seed + 1), bag_of_words()
    model.fit([couplet.line1 for couplet in couplets], [couplet.plan for couplet in couplets])

    def classify(items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"]) -> list[str]:
        words = model.predict([item.prompt for item in items])
        return [world.explanation(item.couplet, item.span, str(word)) for item, word in zip(items, words, strict=True)]

    return classify


def confabulator(nla: NLA, seed: int = 0, n_tries: int = N_CONFABULATIONS) -> Reader:
    """The outsider writes several texts, and the decoder picks the one whose reconstruction is closest.

    The pick looks at the activation: what it gains over the outsider is the decoder's doing, not the text's.
    """

    def pick(items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"]) -> list[str]:
        texts = describer(0.0, seed)([item for item in items for _ in range(n_tries)], vectors)
        offers = [texts[row * n_tries : (row + 1) * n_tries] for row in range(len(items))]
        return [picked for (picked,) in closest_texts(nla, offers, vectors)]

    return pick


def adversaries(
    target: Target,
    nla: NLA | None,
    items: Sequence[RhymeItem],
    vectors: Float[Tensor, "n d"],
    n_samples: int,
    n_fit: int,
    seed: int,
) -> list[MentionScore]:
    """Every adversary's score on the items; the guessing ones are sampled as often as the encoder."""
    scores = [
        score(TEXT_LM, text_lm(target), items, vectors, 1, seed),
        score(OUTSIDER, describer(0.0, seed), items, vectors, n_samples, seed),
        score(BAG, plan_classifier(n_fit, seed), items, vectors, 1, seed),
    ]
    if nla is not None:
        scores.append(score(CONFABULATOR, confabulator(nla, seed), items, vectors, 1, seed))
    return scores


def baselines(
    nla: NLA, items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"], n_samples: int, seed: int
) -> list[MentionScore]:
    """What the encoder says of vectors that are not the item's, and texts that come from no vector of the item.

    empty: no text · constant: its most frequent text for all · mean-activation, Gaussian (of equal length), shuffled
    activation: it explains that instead · other document: a text that it wrote of another item.
    """
    reader = encoder_reader(nla, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    moved = derangement(len(items), seed) if len(items) > 1 else torch.zeros(1, dtype=torch.long)
    noise = torch.randn(vectors.shape, generator=generator)
    false_vectors: dict[str, Tensor] = {
        "mean activation": vectors.mean(0).expand_as(vectors),
        "Gaussian": noise / noise.norm(dim=1, keepdim=True) * vectors.norm(dim=1, keepdim=True),
        "shuffled activation": vectors[moved],
    }
    explanations = reader(items, vectors)
    constant = Counter(explanations).most_common(1)[0][0]
    return [
        score_texts("empty", items, [""] * len(items), 1, seed),
        score_texts("constant", items, [constant] * len(items), 1, seed),
        *(score(name, reader, items, others, n_samples, seed) for name, others in false_vectors.items()),
        score_texts("other document", items, [explanations[row] for row in moved.tolist()], 1, seed),
    ]


def best(scores: Sequence[MentionScore]) -> MentionScore:
    """The adversary that names most, among those that read the text alone (the confabulator's pick does not)."""
    text_alone = (score for score in scores if score.reader != CONFABULATOR)
    return max(text_alone, key=lambda score: score.named.value)


def swap(text: str, old: str, new: str) -> str:
    """``text`` with the word ``old`` replaced by ``new``."""
    return re.sub(rf"\b{re.escape(old)}\b", new, text)


def next_in(pool: Sequence[str], word: str) -> str:
    """Another word of the same kind: the next one in its pool, around the end."""
    return pool[(pool.index(word) + 1) % len(pool)]
