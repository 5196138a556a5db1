"""Readers that put the activation into a prompt of a model without the encoder's training: SelfIE, and oracles.

SelfIE (a Patchscope whose target prompt is the encoder's): the same base without adapters, the same prompt, the same
injection. What the encoder says beyond it, its training taught it. Without a pair it asks a question of its own. An
activation oracle is somebody's adapter on the same base, asked its own question about the injected activation.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nla.errors import ArgumentError, ShapeError
from nla.eval.target import Target
from nla.metrics import rescale
from nla.models.generate import ends_of, generate, pad_of, seeded
from nla.models.hooks import inject
from nla.models.lora import load_adapter, read_adapter_config
from nla.models.points import d_model, device_of, unwrapped
from nla.pair.encoder import strip_tags
from nla.text.tokens import render_prompt, unknown_id

if TYPE_CHECKING:
    from nla.autoencoder import NLA

BATCH_SIZE = 512
QUESTION, MAX_NEW_TOKENS = "The message is: {}\nSay in a few words what it is about, and how it is written.", 24
"""What SelfIE asks where there is no pair, whose own prompt it would take; and the longest answer."""
_SLOTS = ("x", "y")
_ORACLE = "oracle"


class Prompt(NamedTuple):
    """A prompt with one place for an activation."""

    ids: Tensor
    """(t,) int64."""

    position: int
    """Column whose embedding the activation takes."""

    marker_id: int
    """Token there; never sampled."""

    norm: float | None
    """Length that activations are scaled to; None where they are added, whose length is that of the stream."""

    layer: int | None
    """Block at whose output they are added; None: they take the embedding's place."""

    max_new_tokens: int

    @classmethod
    def of(cls, nla: NLA) -> Prompt:
        """The prompt of a pair's encoder."""
        of, ids = nla.config.injection, nla.prompt_ids[0]
        return cls(ids, nla.marker_position, of.marker_id, of.norm, of.layer, nla.config.max_new_tokens)

    @classmethod
    def without_pair(cls, target: Target, vectors: Tensor) -> Prompt | None:
        """``QUESTION`` with a word where the activation goes, scaled to the mean length of ``vectors``.

        None: the target has no chat template, or its tokenizer does not know the question's words.
        """
        tokenizer = target.tokenizer
        if not tokenizer.chat_template:
            return None
        ids, others = (render_prompt(tokenizer, QUESTION.format(slot)) for slot in _SLOTS)
        differ = [column for column, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other]
        if len(ids) != len(others) or len(differ) != 1 or unknown_id(tokenizer) in ids:
            return None
        norm = float(vectors.norm(dim=1).mean())
        return cls(torch.tensor(ids), differ[0], ids[differ[0]], norm, None, MAX_NEW_TOKENS)

    @classmethod
    def ask(cls, nla: NLA, question: str) -> Prompt:
        """A question of one's own, as a chat message that holds the pair's marker once.

        Raises:
            ArgumentError: the marker is missing or repeated.
        """
        own = cls.of(nla)
        ids = render_prompt(nla.tokenizer, question)
        if ids.count(own.marker_id) != 1:
            raise ArgumentError(
                f"the question {question!r} with the marker {ids.count(own.marker_id)} times",
                f"{nla.config.injection.marker!r} exactly once",
                "write it where the activation goes",
            )
        return own._replace(ids=torch.tensor(ids), position=ids.index(own.marker_id))


def answers(
    target: Target,
    prompt: Prompt,
    vectors: Tensor,
    temperature: float | None = 1.0,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """What the target writes after a prompt with each activation (n, d) in it; None for a temperature is greedy.

    Raises:
        ShapeError: another width than the target's.
        NonFiniteError: NaN, infinity, or a vector of zeros.
    """
    model, device = target.model, device_of(target.model)
    if vectors.ndim != 2 or vectors.shape[1] != d_model(model):
        raise ShapeError(f"vectors {tuple(vectors.shape)}", f"(n, {d_model(model)})", "read them with this target")
    entering = rescale(vectors, prompt.norm)

    def injected(rows: Tensor, padding: Tensor) -> contextlib.AbstractContextManager[None]:
        return inject(model, entering[rows].to(device), (padding + prompt.position).to(device), prompt.layer)

    with target.active():
        written = generate(
            model,
            [prompt.ids.tolist()] * len(vectors),
            ends=ends_of(unwrapped(model), target.tokenizer),
            pad=pad_of(target.tokenizer),
            max_new_tokens=prompt.max_new_tokens,
            temperature=temperature,
            generator=seeded(seed, device),
            forbidden=[prompt.marker_id],
            intervene=injected,
            batches=[range(len(vectors))[i : i + batch_size] for i in range(0, len(vectors), batch_size)],
        )
    return [text.strip() for text in written.texts(target.tokenizer)]


def selfie(nla: NLA, target: Target, vectors: Tensor, temperature: float | None = 1.0, seed: int = 0) -> list[str]:
    """What the bare target says in the encoder's place: one text for each activation (n, d), without tags."""
    return [strip_tags(text, nla.config) for text in answers(target, Prompt.of(nla), vectors, temperature, seed)]


def load_oracle(target_folder: str | Path, adapter: str | Path, target: Target) -> Target:
    """An activation oracle: a PEFT adapter on a fresh copy of the base, so that no pair's adapters are touched.

    Args:
        target_folder: the base's folder or hub id.
        adapter: a local PEFT folder: a plain LoRA in ``adapter_model.safetensors``; pickled weights are not read.
        target: whose tokenizer and point the oracle shares.

    Raises:
        ConfigError: there is no such base, or no such adapter, or it is no plain LoRA.
        WeightsError, NonFiniteError: the adapter's weights are not those of an adapter of this base.
    """
    from peft import get_peft_model

    base = Target.load(target_folder, str(target.point)).model
    config = read_adapter_config(adapter)
    config.base_model_name_or_path = str(target_folder)
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial values that are then overwritten
        model: Any = get_peft_model(base, config, adapter_name=_ORACLE)
    load_adapter(adapter, model, _ORACLE)
    return Target(model.eval().to(device_of(target.model)), target.tokenizer, target.point)
