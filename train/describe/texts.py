"""Texts for visible prefixes: each distinct one is asked for once, ever; what it costs is said before and after."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.errors import DescriberError, InterruptedTraining
from nla.train.describe.cache import TextCache, cache_key
from nla.train.describe.describer import Describer, DescriberSettings, Reply
from nla.train.describe.prompt import CUT, Question, ask_about
from nla.train.fit.loop import StopOnInterrupt

ADVICE = {
    CUT: "raise describer.max_tokens (thinking counts too), or ask a model that does not think; the same run goes on",
    "timeout": "raise describer.timeout_s or lower describer.concurrency; the same run goes on",
    "HTTP 429": "lower describer.concurrency, or wait; the same run goes on",
}
_SAMPLE = 1000
"""Prompts whose tokens are counted for the estimate: a tokenizer takes as long for all of them as for asking them."""
_log = logging.getLogger(__name__)


class Estimate(NamedTuple):
    """What the texts that are not on disk will take, if each is answered at once."""

    n_texts: int
    """Distinct texts to ask for."""
    tokens_in: int
    tokens_out_most: int
    """If every answer were as long as allowed."""
    cost_most: float | None
    """USD; None: the prices are not known."""
    counted_by: str
    """How tokens were counted."""

    def __str__(self) -> str:
        cost = "at a cost not known (no prices)" if self.cost_most is None else f"at most {self.cost_most:.2f} USD"
        tokens = f"{self.tokens_in:,} tokens in ({self.counted_by}), at most {self.tokens_out_most:,} out"
        return f"{self.n_texts:,} texts to describe: {tokens}, {cost}, retries not counted"


@dataclass
class Summary:
    """What was done, in distinct texts; it grows while texts are described.

    ``n_texts = n_cached + n_answered + n_open`` and the sum of ``failed``.
    """

    n_rows: int = 0
    """Prefixes given."""
    n_texts: int = 0
    """Distinct ones, as far as they are shown."""
    n_cached: int = 0
    """Whose explanation was on disk, some of them since another process asked meanwhile."""
    n_answered: int = 0
    """Whose explanation was asked for and given."""
    n_open: int = 0
    """Neither answered nor failed so far."""
    failed: Counter[str] = field(default_factory=Counter)
    """Texts without an explanation after all tries, by reason."""
    n_requests: int = 0
    """Requests made; of a local model, answers written, some of them anew for the sake of others in their batch."""
    retried: Counter[str] = field(default_factory=Counter)
    """Requests that were followed by another for the same text, by cause."""
    tokens_in: int = 0
    tokens_out: int = 0
    n_estimated: int = 0
    """Answers whose tokens the endpoint did not say: characters / 4 are counted."""
    n_unknown: int = 0
    """Requests without an answer that an endpoint may have charged for, not counted in tokens and cost."""
    cost: float | None = None
    """USD of the tokens counted; None: the prices are not known."""
    estimate: Estimate | None = None
    """What was expected before."""
    describer: dict[str, Any] = field(default_factory=dict)
    """The describer's identity."""

    @classmethod
    def merged(cls, shares: Sequence[Summary]) -> Summary:
        """What several processes did, each with its own share of the prefixes.

        A text that stands in two shares counts in both.
        """
        merged = cls(
            cost=_added([share.cost for share in shares]), describer=dict(shares[0].describer) if shares else {}
        )
        for name, start in vars(cls()).items():
            if isinstance(start, int | Counter):
                setattr(merged, name, sum((getattr(share, name) for share in shares), start))
        estimates = [share.estimate for share in shares if share.estimate is not None]
        if estimates:
            n_texts, tokens_in, tokens_out, costs, counted_by = zip(*estimates, strict=True)
            cost = _added(costs)
            merged.estimate = Estimate(sum(n_texts), sum(tokens_in), sum(tokens_out), cost, counted_by[0])
        return merged

    def check(self, failing_share: float, n: int | None = None) -> None:
        """Refuse too many failures.

        Args:
            n: of how many texts; None: of these.

        Raises:
            DescriberError: more than the share of the texts failed.
        """
        if self.failed.total() > failing_share * (self.n_texts if n is None else n):
            reason, count = self.failed.most_common(1)[0]
            raise DescriberError(
                f"{self.failed.total()} of {self.n_texts} texts without an explanation, most often: {reason} ({count})",
                f"at most the share {failing_share:g}",
                ADVICE.get(reason, "look at what the describer answers; answers are kept and not asked for again"),
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        content = dataclasses.asdict(self)
        estimate = None if self.estimate is None else self.estimate._asdict()
        return {**content, "failed": dict(self.failed), "retried": dict(self.retried), "estimate": estimate}

    def __str__(self) -> str:
        cost = "cost not known" if self.cost is None else f"{self.cost:.4f} USD"
        parts = [
            f"{self.n_answered + self.n_cached:,} of {self.n_texts:,} texts described ({self.n_cached:,} from disk)",
            f"{self.n_requests:,} requests, {self.retried.total():,} retried{_by(self.retried)}",
            f"{self.failed.total():,} failed{_by(self.failed)}",
            f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out, {cost}",
        ]
        return "; ".join(parts)


class Described(NamedTuple):
    """A text for every prefix, in their order."""

    texts: list[str | None]
    """None: the describer failed on it; leave the row out."""
    summary: Summary


def describe_texts(
    prefixes: Sequence[str],
    describer: Describer,
    cache_dir: str | Path,
    *,
    refused: Collection[str] = (),
    n_all: int | None = None,
    progress: Callable[[Summary], None] | None = None,
) -> Described:
    """An explanation of each visible prefix, as an outsider would write it.

    Equal prefixes are asked for once, and none whose answer is in ``cache_dir``. An answer that is whole but has not
    the right form is kept too: its text has failed, and the same is asked again only under another seed, or with
    another number of tries. Where texts influence one another's answers they are asked in groups that follow from
    ``prefixes`` alone, and a group with a missing answer is asked as a whole: an interrupted call ends with the answers
    of one that was not.

    Args:
        refused: what no explanation may hold, see :func:`nla.train.describe.prompt.pair_marks`.
        n_all: of how many texts ``prefixes`` are one process's share. Only failures that are too many for all of them
            are then an error; the sum is for the caller to look at: :meth:`Summary.merged`, :meth:`Summary.check`.
        progress: called with the running totals after each text; they change afterwards.

    Raises:
        DescriberError: nothing more can be asked, or more than the settings' ``failing_share`` of the texts failed.
        BudgetError: the next request could exceed the budget.
        InterruptedTraining: Ctrl-C; requests under way were finished first. A second Ctrl-C stops at once.
        StorageError: an answer could not be written.
        EmptyTextError, ArgumentError: a prefix is empty, or no text.

    After every error what was answered is kept, and the same call goes on from there.
    """
    stop = StopOnInterrupt()
    with TextCache(cache_dir) as cache, stop.catching():
        work = _Work(prefixes, describer, cache, tuple(refused), n_all)
        work.look_up()
        work.check()
        _log.info("%s", work.summary.estimate)
        replies: Any = describer.ask(work.questions(), lambda: stop.asked or work.too_many())
        try:
            for reply in replies if work.open else ():
                work.take(reply)
                if progress is not None:
                    progress(work.summary)
            work.take_from_others()
            work.check()  # when requests under way are through: they are paid for, and their answers are kept
        finally:
            replies.close()  # ends the requests, after an error of our own too
            _log.info("%s", work.summary)
        if work.open:
            got = f"an interrupt after {work.summary.n_texts - len(work.open)} of {work.summary.n_texts} texts"
            raise InterruptedTraining(got, "all texts", "run the same command: nothing is asked twice")
        return Described(work.texts, work.summary)


class _Work:
    """The rows of each distinct text, and what is known of it so far."""

    def __init__(
        self,
        prefixes: Sequence[str],
        describer: Describer,
        cache: TextCache,
        refused: tuple[str, ...],
        n_all: int | None,
    ) -> None:
        self.n_all = n_all
        self.prefixes, self.describer, self.cache, self.refused = prefixes, describer, cache, refused
        self.settings, self.identity = describer.settings, dict(describer.identity)
        self.texts: list[str | None] = [None] * len(prefixes)
        self.rows: dict[str, list[int]] = {}
        self.open: dict[int, str] = {}
        """Keys of the texts without an outcome, by the first row that has the text."""
        self.groups: list[list[tuple[int, str]]] = []
        """Rows, each the first of its text, and keys of what is asked together; those with an answer missing."""
        self.from_others: SimpleQueue[tuple[Question, str]] = SimpleQueue()
        self.summary = Summary(n_rows=len(prefixes), describer=self.identity)

    def question(self, row: int) -> Question:
        """Made when it is needed, so that prompts are never all in memory."""
        return ask_about(row, self.prefixes[row], self.settings.max_chars, self.refused)

    def look_up(self) -> None:
        """Find equal texts and those on disk, and estimate the rest."""
        lengths: dict[int, int] = {}
        for row in range(len(self.prefixes)):
            prompt = self.question(row).prompt
            key = cache_key(self.identity, prompt)
            if key in self.rows:
                self.rows[key].append(row)
            else:
                self.rows[key], self.open[row], lengths[row] = [row], key, len(prompt)
        s, size = self.summary, self.describer.together
        s.n_texts = s.n_open = len(self.rows)
        # What sways one another is sorted by length, for little padding, whatever has been answered by now.
        order = list(self.open.items())
        if size > 1:
            order.sort(key=lambda item: (-lengths[item[0]], item[1]))
        for row, key in list(self.open.items()):  # once all rows of a text are known
            if (answer := self.kept(row, key)) is not None:
                self._use_kept(self.question(row), answer)
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        self.groups = [group for group in groups if any(row in self.open for row, _ in group)]
        s.cost, s.estimate = self.settings.cost(0, 0), self._estimate()

    def _estimate(self) -> Estimate:
        """What is to be asked, from the tokens of some of it."""
        rows = [row for group in self.groups for row, _ in group]
        sample = rows[:: math.ceil(len(rows) / _SAMPLE)] if rows else []
        tokens = sum(self.describer.count(self.question(row).prompt) for row in sample)
        counted_by = self.describer.counted_by
        if len(sample) < len(rows):
            tokens = round(tokens / len(sample) * len(rows))
            counted_by += f", from {len(sample):,} of them"
        most = len(rows) * self.settings.max_tokens
        return Estimate(len(rows), tokens, most, self.settings.cost(tokens, most), counted_by)

    def questions(self) -> Iterator[Question]:
        """What is still to be asked when its turn comes: another process may have asked since. Runs in any thread."""
        for group in self.groups:
            answers = {row: self.kept(row, key) for row, key in group}
            for row, _ in group:
                if None in answers.values():
                    yield self.question(row)
                elif (answer := answers[row]) is not None:
                    self.from_others.put((self.question(row), answer))

    def kept(self, row: int, key: str) -> str | None:
        """The answer on disk to the question about a row: an explanation, or a failure after as many tries as now."""
        answer = self.cache.get(key)
        readable = answer is not None and self.question(row).read(answer).text is not None
        return answer if readable else self.cache.get(self._failed(key))

    def keep(self, key: str, row: int, answer: str, failed: bool) -> None:
        """Put an answer on disk; an explanation takes the place of a failure that earlier versions kept there."""
        if failed:
            self.cache.put(self._failed(key), answer)
        else:
            before = self.cache.get(key)
            readable = before is not None and self.question(row).read(before).text is not None
            self.cache.put(key, answer, None if readable else before)

    def _failed(self, key: str) -> str:
        return f"{key} failed after {self.settings.attempts}"

    def take(self, reply: Reply) -> None:
        """Keep a reply on disk, then count it; one that was asked again for the sake of its group has its outcome."""
        known = reply.number not in self.open
        if not known and reply.answer is not None and reply.settled:
            self.keep(self.open[reply.number], reply.number, reply.answer, reply.text is None)
        s = self.summary
        s.n_requests += reply.n_requests
        s.retried.update(reply.retried)
        s.tokens_in += reply.tokens_in
        s.tokens_out += reply.tokens_out
        s.n_estimated += reply.n_estimated
        s.n_unknown += reply.n_unknown
        s.cost = self.settings.cost(s.tokens_in, s.tokens_out)
        if reply.settled and not known:
            s.n_answered += reply.text is not None
            self._settle(reply.number, reply.text, reply.problem)
        self.take_from_others()

    def take_from_others(self) -> None:
        """Take what other processes answered meanwhile."""
        while not self.from_others.empty():
            self._use_kept(*self.from_others.get())

    def _use_kept(self, question: Question, answer: str) -> None:
        if question.number not in self.open:
            return
        text, problem = question.read(answer)
        self.summary.n_cached += text is not None
        self._settle(question.number, text, problem)

    def _settle(self, number: int, text: str | None, problem: str) -> None:
        self.summary.n_open -= 1
        if text is None:
            self.summary.failed[problem] += 1
        for row in self.rows[self.open.pop(number)]:
            self.texts[row] = text

    def too_many(self) -> bool:
        """Whether more texts have failed than may."""
        s = self.summary
        return s.failed.total() > self.settings.failing_share * (s.n_texts if self.n_all is None else self.n_all)

    def check(self) -> None:
        """Raise when that is so."""
        self.summary.check(self.settings.failing_share, self.n_all)


def open_describer(
    settings: DescriberSettings,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
) -> Describer:
    """The describer that the settings name.

    Args:
        model: the target, already loaded, for ``local`` without a ``model`` of its own.
        tokenizer: the target's.
        dtype: of the weights of ``local``'s own ``model``, unless the settings say it.
        device: where to put that model; None: the first GPU if there is one, else the CPU.

    Raises:
        EndpointError: the address or the key is not one to be used.
        DescriberError: there is no model.
        MissingExtraError: the provider's client is not installed.
        NLAError: whatever :func:`nla.models.load.load_target` raises.
    """
    if settings.describer != "local":
        from nla.train.describe.client import EndpointDescriber

        return EndpointDescriber(settings)
    from nla.train.describe.local import LocalDescriber

    if settings.model is not None:
        from nla.models.load import load_target

        model, tokenizer = load_target(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype or dtype,
            device=device,
            quantization=settings.quantization,
        )
    if model is None or tokenizer is None:
        got, expected = "a local describer without a model", "the loaded target and its tokenizer, or a model's name"
        raise DescriberError(got, expected, "pass model and tokenizer, or set describer.model")
    return LocalDescriber(settings, model, tokenizer)


def _added(costs: Sequence[float | None]) -> float | None:
    """USD together; None: one of them is not known."""
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(costs) else None


def _by(counts: Counter[str]) -> str:
    """Causes and their counts in brackets, the most frequent first."""
    return f" ({', '.join(f'{cause} {count}' for cause, count in counts.most_common())})" if counts else ""
