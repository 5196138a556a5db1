"""The way of data through the house: which file hands a text, ids, activations or explanations to which."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
GROUND = ("errors.py", "storage", "stats.py", "metrics.py", "config.py", "baselines.py", "organisms")
"""What every file may use at any time, and the worlds of the embedded models."""

START = "the test"

COROUTINE_OR_GENERATOR = 0x20 | 0x80 | 0x100 | 0x200


class Stay(NamedTuple):
    """A file that data was handed to, and the file that did it."""

    file: str
    handed_by: str


def way(run: Callable[[], Any]) -> list[Stay]:
    """The stays of what ``run`` handles, in order.

    A hand-over is a call from one of our files into another with data among its arguments: text, token ids, tensors, or
    what is made of them. A stay lasts from the first hand-over into a file until the file that handed it over hands to
    another: a caller that gets a result back waited for it and has not been left. A file that is handed data by two
    files, or by one at two times, has two stays.

    Left out are the ground floor, properties, context managers (roles, hooks), functions within functions (callbacks)
    and whatever a library calls (a module's forward pass).
    """
    stays: list[Stay] = []
    latest: dict[str | None, str | None] = {}
    """By file, the one that it handed data to last."""

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or frame.f_back is None:
            return
        callee, caller = _file(frame.f_code), _file(frame.f_back.f_code)
        if None in (callee, caller) or callee in (caller, START) or not _counts(frame, str(callee)):
            return
        if latest.get(caller) != callee:
            latest[caller] = callee
            stays.append(Stay(str(callee), str(caller)))

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return stays


def _file(code: CodeType) -> str | None:
    """A file of ours by its path, ``START`` for a test, None for a library."""
    path = Path(code.co_filename)
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""
    if name.startswith("tests/"):
        return START
    return name if name.startswith(("nla/", "train/", "eval/")) else None


def _counts(frame: FrameType, file: str) -> bool:
    code, parts = frame.f_code, file.split("/")
    if (parts[0] == "nla" and parts[1] in GROUND) or code.co_flags & COROUTINE_OR_GENERATOR:
        return False
    if "<" in code.co_qualname or (code.co_name.startswith("__") and code.co_name != "__call__"):
        return False
    if isinstance(getattr(type(frame.f_locals.get("self")), code.co_name, None), property):
        return False
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return any(_is_data(frame.f_locals[name]) for name in names if name not in ("self", "cls"))


def _is_data(value: Any, depth: int = 3) -> bool:
    """Whether a value is or holds a text of several words, rows of token ids, a tensor, or an object of such."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 1
    if isinstance(value, str):
        return len(value.split()) > 1
    if depth and isinstance(value, list | tuple):
        rows = any(isinstance(item, list) and item and isinstance(item[0], int) for item in value)
        return rows or any(_is_data(item, depth - 1) for item in value[:8])
    fields = getattr(value, "__dataclass_fields__", None) if depth else None
    return fields is not None and any(_is_data(getattr(value, name, None), depth - 1) for name in fields)
