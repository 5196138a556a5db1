"""Text to token ids and spans, the choice of positions, and chat prompts."""

from __future__ import annotations

import datetime
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

from transformers import PreTrainedTokenizerBase

from nla.errors import (
    ArgumentError,
    ConfigError,
    ContextLengthError,
    EmptyTextError,
    NLAError,
    PositionError,
    TemplateError,
    VocabularyError,
    WeightsError,
)
from nla.storage.files import folder_of
from nla.storage.hub import answers, fetch_file
from nla.storage.schema import shown
from nla.text.patterns import compile_pattern
from nla.text.templates import render_template


class Span(NamedTuple):
    """One token and the characters of the text that it covers.

    ``text`` is ``source[start:end]``; it is empty for a token that the tokenizer ``added`` itself, such as BOS, and for
    white space where the tokenizer leaves it out of its offsets.
    """

    token_id: int
    text: str
    start: int
    end: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] (the tuple's method is not used)
    added: bool = False
    fragment: int = 1
    """Which part of its characters the token is, from 1: bytes of one character that are several tokens share it."""
    fragments: int = 1
    """In how many parts they are."""


class Encoded(NamedTuple):
    """The token ids of a text and one span per token."""

    ids: list[int]
    spans: list[Span]
    text: str = ""


_FORMS = '"all", "last", indexes of tokens, a slice, or a pattern between slashes such as "/\\n/"'

PROMPT_DATE = "26 Jul 2024"
"""The day of every prompt and transcript, where a chat template asks for today's. See :func:`undated`."""

_DAY = datetime.datetime(2024, 7, 26)
_QUOTED = re.compile(r"""(?=(['"])([^'"{}\\\n]*)\1)""")  # looked for at every quote: none hides the next
_DATE_PART = re.compile("%-?[A-Za-z]")
"""A string in a template that may be a format of dates; what is none does no harm."""

_VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""Files that hold a tokenizer's vocabulary, any of these."""

_FILES, _LARGEST = ("*.json", "*.jinja", "*.txt", "*.model"), 256 * 2**20
"""What else than weights transformers reads of a folder, and how many bytes that may be."""

_Positions = str | int | slice | Sequence[int]
Positions = _Positions | Sequence[_Positions] | Callable[[int, list[Span]], Sequence[int]]
"""Which tokens: "all", "last", one token's index or several, a slice of them, a pattern such as "/\\n/"; a list of
these, one for each text; or a function of document index and spans."""


def _size(file: Path) -> int:
    """Bytes of a file; of what cannot be asked, none."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def load_tokenizer(
    source: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, as its tokenizer.json says.

    transformers' ``AutoTokenizer`` gives every folder with a Qwen2 config Qwen's own splitting rules, whatever its
    tokenizer.json holds; a tokenizer that was saved as generic is therefore loaded as generic. To a folder that holds
    no vocabulary it gives a tokenizer that knows no words, which is refused here.

    Raises:
        TargetError, AccessError: there is no such folder or hub id, or it cannot be reached.
        WeightsError: it holds no vocabulary (its own code may do without, if it is trusted), or one that does not load.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    folder = folder_of(source)
    source = str(folder or source)
    large = [] if folder is None else [file for kind in _FILES for file in folder.glob(kind) if _size(file) > _LARGEST]
    if large:
        got = f"{large[0]} of {_size(large[0]):,} bytes"
        raise WeightsError(got, f"a tokenizer's file, of at most {_LARGEST:,}", "restore the folder")
    has_words = any(all(fetch_file(source, revision, name, optional=True) for name in names) for names in _VOCABULARIES)
    if not has_words and not trust_remote_code:
        raise WeightsError(
            f"a tokenizer in {source} without a vocabulary",
            "tokenizer.json, tokenizer.model, or vocab.json and merges.txt",
            "put the target's tokenizer beside it: load it with transformers and call save_pretrained",
        )
    try:
        arguments: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        arguments["local_files_only"] = folder is None and not answers(source, "tokenizer_config.json", revision)
        saved_as = get_tokenizer_config(source, **arguments).get("tokenizer_class")
        generic = saved_as in ("TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(source, **arguments)
        tokenizer("a")  # settings of another type than they should have show at the first text, or
        unknown_id(tokenizer)  # when a special token is asked for
    except NLAError:
        raise
    except Exception as error:  # the parsers of its files raise errors of many types, Exception itself among them
        raise WeightsError(
            f"a tokenizer in {source} that does not load ({type(error).__name__}: {shown(str(error))})",
            "whole tokenizer files",
            "restore the folder, or download it again",
        ) from error
    _fit_to_model(tokenizer, source, revision)
    return tokenizer


def _fit_to_model(tokenizer: PreTrainedTokenizerBase, source: str, revision: str | None) -> None:
    """Hold a tokenizer against the number of embeddings that the config.json beside it states, if it does.

    Words of the vocabulary beyond are of another model. Added tokens beyond are in published models that never use
    them: :func:`nla.metrics.check_ids` refuses them in an input, and one that pads, which every batch would have, pads
    no more.
    """
    from transformers import AutoConfig

    path = fetch_file(source, revision, "config.json", optional=True)
    try:
        n_tokens = None if path is None else AutoConfig.from_pretrained(path.parent).get_text_config().vocab_size
    except Exception:  # of a configuration that is not to be had, loading the model says what is wrong
        return
    if not isinstance(n_tokens, int):
        return
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= n_tokens}
    words = sorted(set(beyond) - set(tokenizer.added_tokens_decoder))
    if words:
        raise WeightsError(
            f"a tokenizer in {source} whose token {shown(beyond[words[0]])} has the id {words[0]} ({len(words)} such)",
            f"ids below {n_tokens}, the target's embeddings",
            "put the target's own tokenizer beside it",
        )
    if tokenizer.pad_token_id in beyond:
        tokenizer.pad_token = None


def encode(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> Encoded:
    """Token ids of one text (special tokens as the tokenizer adds them) and their spans. See :func:`encode_batch`."""
    return encode_batch(tokenizer, [text], max_length)[0]


def check_texts(texts: str | Sequence[str]) -> None:
    """Refuse what is no text.

    Raises:
        ArgumentError: not a str, or one with a lone surrogate (half of a character), which no tokenizer can take.
    """
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        if not isinstance(text, str):
            raise ArgumentError(f"text {number} of type {type(text).__name__}", "a str", "decode or convert it first")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"text {number} with the lone surrogate {text[error.start]!r} at character {error.start}",
                "whole characters",
                "read the text as UTF-8, or replace it: text.encode(errors='replace').decode()",
            ) from error


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: str | Iterable[str], max_length: int | None, allow_unknown: bool = False
) -> list[Encoded]:
    """Token ids and spans of many texts.

    A text that begins with what the tokenizer would add before it, such as a rendered chat with BOS, is not given a
    second one; the first counts as added.

    Args:
        max_length: the model's context in tokens; nothing is ever cut off in silence. None: any length.
        allow_unknown: let unknown words through as the unknown token, for texts that an encoder wrote.

    Raises:
        EmptyTextError: a text has no tokens.
        ContextLengthError: a text has more than ``max_length`` tokens.
        VocabularyError: a text holds words that become the unknown token; the message lists them.
        ArgumentError: a text is no text, or the tokenizer cannot say which characters a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            f"a {type(tokenizer).__name__} without character offsets",
            "a fast tokenizer (tokenizer.json)",
            "load it with nla.text.tokens.load_tokenizer(...) from a folder that holds tokenizer.json",
        )
    texts = as_list(texts)
    check_texts(texts)
    for number, text in enumerate(texts):
        if not text:
            raise _empty(number, text)
    if not texts:
        return []
    # Quiet: the tokenizer's own warning about length would come before the error that says what to do.
    plain: dict[str, Any] = {"padding": False, "truncation": False, "verbose": False}
    batch = tokenizer(list(texts), return_offsets_mapping=True, return_special_tokens_mask=True, **plain)
    columns = (batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"])
    unknown = unknown_id(tokenizer)
    out: list[Encoded] = []
    for number, (text, ids, offsets, added) in enumerate(zip(texts, *columns, strict=True)):
        n_before = next((index for index, is_added in enumerate(added) if not is_added), 0)
        if n_before and ids[:n_before] == ids[n_before : 2 * n_before]:
            ids, offsets = ids[n_before:], offsets[n_before:]
            added = [1] * n_before + added[2 * n_before :]
        _check_length(number, text, len(ids), max_length)
        spans = [
            Span(token, text[start:end], start, end, index, bool(is_special))
            for index, (token, (start, end), is_special) in enumerate(zip(ids, offsets, added, strict=True))
        ]
        if all(span.added for span in spans):
            raise _empty(number, text)
        strange = [span for span in spans if span.token_id == unknown and not span.added]
        if strange and not allow_unknown:
            _refuse_unknown(number, strange)
        out.append(Encoded(ids, _with_fragments(spans), text))
    return out


def check_lengths(encoded: Sequence[Encoded], max_length: int) -> None:
    """Refuse texts beyond a model's context.

    Raises:
        ContextLengthError: a text has more than ``max_length`` tokens.
    """
    for number, entry in enumerate(encoded):
        _check_length(number, entry.text, len(entry.ids), max_length)


def _check_length(number: int, text: str, n_tokens: int, max_length: int | None) -> None:
    if max_length is not None and n_tokens > max_length:
        raise ContextLengthError(
            f"text {number} with {n_tokens} tokens ({text[:40]!r}…)",
            f"at most {max_length} tokens, the model's context",
            "shorten the text, or split it into documents",
        )


def _with_fragments(spans: list[Span]) -> list[Span]:
    """Spans with the number of each among those that share a character with it."""
    real = [span for span in spans if span.start < span.end]
    if all(before.end <= after.start for before, after in pairwise(real)):
        return spans
    groups: list[list[Span]] = []
    for span in real:
        if groups and span.start < groups[-1][-1].end:
            groups[-1].append(span)
        else:
            groups.append([span])
    out = list(spans)
    for group in groups:
        for number, span in enumerate(group, start=1):
            out[span.index] = span._replace(fragment=number, fragments=len(group))
    return out


def as_list(texts: str | Iterable[str]) -> list[str]:
    """Texts as a list; one text is a list of one.

    >>> as_list("cat"), as_list(("cat", "dog"))
    (['cat'], ['cat', 'dog'])
    """
    return [texts] if isinstance(texts, str) else list(texts)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, texts: str | Iterable[str], max_length: int | None
) -> list[list[int]]:
    """Token ids of texts as a target reads them: with the special tokens that its tokenizer adds, such as BOS.

    Raises:
        See :func:`encode_batch`.
    """
    return [encoded.ids for encoded in encode_batch(tokenizer, texts, max_length)]


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of pieces of text, without the special tokens that a tokenizer adds to a whole one."""
    rows: Any = tokenizer(as_list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return rows


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that unknown words become; None if there is none, or if it has another meaning too.

    Tokenizers of GPT-2's family know every text, and name one token beginning, end and unknown: there the tokenizer's
    ``unk_token_id`` in a text is no unknown word. Ask here, never there (a test of the source holds this).
    """
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    unknown: Any = tokenizer.unk_token_id
    return None if unknown in others else unknown


def _empty(number: int, text: str) -> EmptyTextError:
    return EmptyTextError(f"text {number}: {text!r}, which has no tokens", "text of one token or more", "give a text")


def _refuse_unknown(number: int, spans: list[Span]) -> None:
    words = list(dict.fromkeys(span.text.strip() for span in spans))
    listed = ", ".join(repr(word if len(word) <= 40 else word[:40] + "…") for word in words[:10])
    listed += " …" if len(words) > 10 else ""
    raise VocabularyError(
        f"text {number} with {len(words)} word(s) outside the vocabulary: {listed}",
        "words that the target's tokenizer knows",
        "use words of the target's world (an organism knows few), or another target",
    )


def select_positions(spans: list[Span], positions: Positions, document: int = 0) -> list[int]:
    """Token indexes that ``positions`` means in one text, in order.

    "all" is every token of the text, so not those the tokenizer added (BOS carries an outlier activation); "last" is
    the last token. A string between slashes is a regular expression searched in each token's text: "/\\n/".

    Raises:
        PositionError: a pattern matches no token, an index is out of range, or ``positions`` is of no known form.
    """
    if callable(positions):
        positions = positions(document, spans)
    if isinstance(positions, str):
        return _named_positions(spans, positions, document)
    each = _by_text(positions)
    if each is not None:
        check_positions(positions, max(len(each), document + 1))
        return select_positions(spans, each[document], document)
    ones: Any = range(len(spans))[positions] if isinstance(positions, slice) else positions
    ones = ones.tolist() if hasattr(ones, "tolist") else ones  # of numpy or torch
    try:
        ones = [ones] if isinstance(ones, SupportsIndex) else ones
        chosen = [operator.index(one) for one in ones]
    except TypeError as error:
        raise PositionError(f"positions {shown(positions)}", _FORMS, "count tokens from 0") from error
    wrong = [one for one in chosen if not -len(spans) <= one < len(spans)]
    if wrong or not chosen:
        raise PositionError(
            f"positions {wrong or chosen} in text {document}",
            f"at least one index, each below the text's {len(spans)} tokens",
            'choose indexes in that range, or use "all", "last" or a pattern such as "/\\n/"',
        )
    return [one % len(spans) for one in chosen]


def check_positions(positions: Positions, n_texts: int) -> None:
    """Refuse a list of positions with an entry for each text, of which there are more or fewer.

    Raises:
        PositionError: it is one.
    """
    each = _by_text(positions)
    if each is not None and len(each) != n_texts:
        raise PositionError(f"positions for {len(each)} texts", f"one entry for each of {n_texts}", "give as many")


def _by_text(positions: Any) -> list[Any] | None:
    """The entries of a list with one for each text; None: it is meant for every text."""
    listed = positions.tolist() if hasattr(positions, "tolist") else positions
    if not isinstance(listed, list | tuple) or all(isinstance(entry, SupportsIndex) for entry in listed):
        return None
    return list(listed)


def _named_positions(spans: list[Span], positions: str, document: int) -> list[int]:
    if positions == "all":
        return [span.index for span in spans if not span.added]
    if positions == "last":
        return [len(spans) - 1]
    if len(positions) < 3 or not (positions.startswith("/") and positions.endswith("/")):
        raise PositionError(
            f"positions {positions!r}",
            _FORMS,
            f'write "/{re.escape(positions)}/" to match tokens with this text',
        )
    pattern = compile_pattern(positions[1:-1], "the pattern", error=PositionError)
    matching = [span.index for span in spans if not span.added and pattern.search(span.text)]
    if not matching:
        some = " ".join(repr(span.text) for span in spans[:12])
        raise PositionError(
            f"the pattern {positions!r}, which matches no token of text {document}",
            f"a pattern that matches a token's text, among {some}{' …' if len(spans) > 12 else ''}",
            "correct the pattern; it is searched within single tokens, not across them",
        )
    return matching


def render_prompt(tokenizer: PreTrainedTokenizerBase, content: str) -> list[int]:
    """Token ids of a one-message chat prompt, up to where the assistant's answer begins.

    Rendered to text and encoded without special tokens: the template writes its own, so BOS stands exactly once. The
    prompt is the same every day (see :func:`undated`).

    Raises:
        ConfigError: the tokenizer has no chat template.
        TemplateError: the template refuses the message, or edits it.
    """
    template = undated(tokenizer)
    messages = [{"role": "user", "content": content}]
    try:
        text = render_template(tokenizer, template, messages, add_generation_prompt=True)
    except TemplateError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise TemplateError(
            f"a chat template that refuses a single user message ({str(error)[:200]})",
            "one that renders it",
            "use the tokenizer of a target that was tuned for chats",
        ) from error
    if text.count(content) != 1:
        raise TemplateError(
            f"a chat template that writes {content[:40]!r}… {text.count(content)} times as it stands",
            "once, to the letter",
            "write the prompt as the template gives it: most take white space off its ends",
        )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def undated(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """A tokenizer's chat template, in which today is ``PROMPT_DATE``, in the format that the template asks for.

    Of several templates it is the one that transformers takes: with tools, the one that is named tool_use. To be given
    to ``apply_chat_template`` as ``chat_template``: what a template writes would change from day to day.

    Raises:
        ConfigError: there is no chat template, or several without a default.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "a tokenizer without a chat template", "one that has it", "use an instruction-tuned target's tokenizer"
        )
    try:
        template: str = tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None)
    except ValueError as error:
        raise ConfigError(
            f"a tokenizer with the chat templates {', '.join(sorted(tokenizer.chat_template))}",
            "one template, or one that is named default",
            "set tokenizer.chat_template to the one that the target was tuned with",
        ) from error
    if "strftime_now" not in template:
        return template
    formats = dict.fromkeys(match[2] for match in _QUOTED.finditer(template) if _DATE_PART.search(match[2]))
    dates = ", ".join(f"'{name}': '{_DAY.strftime(name)}'" for name in formats)
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ {{{dates}}}.get(format, '{PROMPT_DATE}') }}}}{{%- endmacro %}}"
    return macro + "\n" + template  # transformers' templates lose the line break after a block


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indexes of rows in batches of similar length, each of at most ``max_tokens`` tokens with padding (or one row).

    >>> length_batches([5, 1, 2, 5], max_tokens=10)
    [[1, 2], [0, 3]]

    Raises:
        ArgumentError: ``max_tokens`` is below 1.
    """
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens={max_tokens}", "1 or more", "give a batch at least one token")
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[row] <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
