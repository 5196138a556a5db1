"""Every error a user can meet: what was got, what was expected, and what to do next."""

from __future__ import annotations


def visible(text: str) -> str:
    """A text with its control characters spelled out, on one line: it cannot colour, hide or move what is on a screen.

    >>> visible("cat\\n")
    'cat⏎'
    >>> visible("\\x1b[31m")
    '\\\\x1b[31m'
    """
    return "".join(
        character if character.isprintable() else "⏎" if character == "\n" else repr(character)[1:-1]
        for character in text
    )


_LONGEST_PART = 1000
"""Characters of each of an error's three parts: what a file holds never fills a screen."""


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_PART else f"{text[: _LONGEST_PART // 2]} … {text[-_LONGEST_PART // 2 :]}"


class NLAError(Exception):
    """Base of all errors raised for bad input or bad files; catch it to catch them all."""

    def __init__(self, got: str, expected: str, fix: str) -> None:
        self.got, self.expected, self.fix = _cut(got), _cut(expected), _cut(fix)
        super().__init__(f"Got {self.got}; expected {self.expected}. Next: {self.fix}")

    def __reduce__(self) -> tuple:
        return type(self), (self.got, self.expected, self.fix)


class ArgumentError(NLAError, ValueError):
    """An argument is outside its range, such as ``samples=0``."""


class ArchitectureError(NLAError):
    """The model's architecture is not one whose blocks and norms are known."""


class PointError(NLAError, ValueError):
    """A point does not parse or lies outside the model."""


class PositionError(NLAError, ValueError):
    """A position is out of range, or a pattern matches no token."""


class ConfigError(NLAError):
    """A saved configuration is missing, malformed, edited, or contradicts the weights beside it."""


class TokenizerMismatchError(ConfigError):
    """The tokenizer at hand is not the one the pair was trained with."""


class MarkerError(NLAError):
    """The marker is missing, repeated, or has other neighbours than it was trained with."""


class ShapeError(NLAError, ValueError):
    """A tensor has the wrong shape or width."""


class NonFiniteError(NLAError, ValueError):
    """A tensor holds NaN or infinity."""


class EmptyTextError(NLAError, ValueError):
    """A text has no tokens."""


class ContextLengthError(NLAError, ValueError):
    """A text is longer than the model's context."""


class VocabularyError(NLAError, ValueError):
    """A text holds words that the tokenizer cannot represent."""


class ParseError(NLAError, ValueError):
    """A text does not have the form it must have."""


class WeightsError(NLAError):
    """A weight file is missing, truncated, corrupt, or holds other tensors than expected."""


class BaselineError(NLAError, ValueError):
    """FVE has no usable denominator: too few vectors, or no variance."""


class StorageError(NLAError, OSError):
    """A file could not be written whole, for example because the disk is full."""


class RecipeError(NLAError, ValueError):
    """A recipe is malformed or asks for what cannot be done."""


class TranscriptError(ParseError):
    """A transcript is cut, malformed, of another model, or larger than allowed."""


class TemplateError(ConfigError):
    """A chat template drops, repeats, reorders or edits the messages that it renders."""


class RubricError(NLAError, ValueError):
    """A rubric is malformed, or asks for a way of matching that is not there."""


class JudgeError(NLAError):
    """A judge cannot be reached, or does not answer as it should."""


class EndpointError(NLAError):
    """An endpoint's address or key is not one to be used, or it cannot be reached, refuses, or has no answer."""


class DescriberError(NLAError):
    """A describer is unknown, cannot be reached, refuses, or fails on too many texts."""


class BudgetError(DescriberError):
    """What is left of a budget does not cover the next request."""


class TargetError(NLAError, OSError):
    """There is no such target, it cannot be reached, or it has no weights that are safe to read."""


class AccessError(TargetError):
    """A gated or private repository, and no token that opens it."""


class CorpusError(NLAError, ValueError):
    """A corpus is not there, cannot be read, or has not the column that is asked for."""


class StoreError(NLAError):
    """A store of activations is unfinished, damaged, of other settings, or its splits share a document."""


class SeparateModelsError(ArgumentError):
    """What needs adapters on a shared base is asked of a pair whose encoder and decoder are whole models."""


class SidecarError(ConfigError):
    """Another project's description of its weights is missing, lacks a key, or describes other weights."""


class ExportError(NLAError, ValueError):
    """A format has no place for something that a pair consists of."""


class HubError(ConfigError):
    """The hub lacks a repository, does not open it, or cannot be reached."""


class MissingExtraError(NLAError, ImportError):
    """Something optional is asked for that is not installed."""


class RequestError(NLAError):
    """A server refuses a request: not allowed, malformed, too large, of what is not served, or one too many."""

    def __init__(self, got: str, expected: str, fix: str, status: int) -> None:
        super().__init__(got, expected, fix)
        self.status = status
        """Of HTTP, such as 404."""

    def __reduce__(self) -> tuple:
        return type(self), (self.got, self.expected, self.fix, self.status)


class InterruptedTraining(NLAError):
    """Training was stopped; what it had reached is saved and the same command resumes it."""


class OutOfMemoryError(NLAError):
    """A device has no room for what was asked of it."""
