"""NLA: target, encoder and decoder of one pair; read, explain, reconstruct, score, save, load."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.baselines import UNKNOWN_STRATUM, cosine_of_ignorance
from nla.config import NLAConfig
from nla.errors import ArgumentError, ConfigError, ShapeError, visible
from nla.metrics import Baseline, cosine
from nla.models.generate import Watch, ends_of
from nla.models.points import Point, block, device_of, unwrapped
from nla.models.read import Activations, Intervene, Strata, read
from nla.models.selfcheck import check_stream
from nla.organisms import hash_target, local_folder, noted_target
from nla.pair import folder as pair_folder
from nla.pair import publish
from nla.pair.card import doubt, headline
from nla.pair.decoder import Decoder, DecoderBatch
from nla.pair.encoder import Encoder, whole_seeds
from nla.pair.explanations import Explanations, judge
from nla.pair.roles import Head, Parts, Role, Roles, SharedBase, check_role, planted, require_shared
from nla.pair.score import Score, check_store, denominators, score
from nla.pair.separate import Devices
from nla.store.reader import Store
from nla.text.tokens import Positions
from nla.transcripts.messages import Transcript
from nla.transcripts.prepared import chats_of

Vectors = Float[Tensor, "n d"] | np.ndarray | Sequence[Sequence[float]]
"""Vectors (n, d), a row each."""


class NLA:
    """A natural-language autoencoder: target, encoder and decoder.

    In a pair that is trained here one base plays all three roles: bare as the target, with the adapter "default" as the
    encoder, cut after the point with the adapter "decoder" and a head as the decoder. In a pair of imported full
    weights each role has a model of its own, loaded at first use. See nla/pair/roles.py.

    Threads may share a pair: one at a time plays a role, and the others wait. Samples come from a random source of each
    call, so equal seeds give equal samples whatever else runs. After an exception or Ctrl-C the pair is as before.
    """

    def __init__(
        self,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        config: NLAConfig,
        baselines: Mapping[str, Baseline] | None = None,
        metrics: Mapping[str, object] | None = None,
    ) -> None:
        """Put the parts together; most callers want :meth:`from_pretrained` or :meth:`create`.

        Raises:
            ConfigError, TokenizerMismatchError, MarkerError: the config does not fit the tokenizer or the model.
        """
        config.check_tokenizer(tokenizer)
        if roles.shared:
            config.check_model(roles.model.config)
        self.roles, self.tokenizer = roles, tokenizer
        self.encoder, self.decoder = Encoder(roles, tokenizer, config), Decoder(roles, tokenizer, config)
        self.baselines: dict[str, Baseline] = dict(baselines or {})
        """Baselines of the unit-length training activations, by stratum, and "global"."""
        self.metrics: dict[str, Any] = dict(metrics or {})
        """What was measured, as saved in metrics.json."""
        self.target_folder: Path | None = None
        """Where a local target lies; :meth:`save_pretrained` writes it relative to the pair's folder."""
        self.weight_folders: dict[str, Path] = {}
        """Where the full weights of a local encoder and decoder lie, by role."""
        self.origin: tuple[str, str | None] | None = None
        """What it was loaded from: a folder's absolute path or a hub id, and the revision; None: made here."""

    @property
    def config(self) -> NLAConfig:
        """The contract of the pair. Setting another makes encoder, decoder and point anew by it.

        Raises:
            ConfigError, MarkerError, PointError: it does not fit the tokenizer, the target or the models.
        """
        return self.encoder.config

    @config.setter
    def config(self, config: NLAConfig) -> None:
        encoder, decoder = Encoder(self.roles, self.tokenizer, config), Decoder(self.roles, self.tokenizer, config)
        if isinstance(self.roles, SharedBase):
            self.roles.cut(config)
        elif config.point != self.config.point:
            got = f"the point {config.point} for a decoder that is cut at {self.config.point}"
            raise ConfigError(got, "the point that its weights are for", "import the pair again, at the other point")
        self.encoder, self.decoder = encoder, decoder

    @property
    def point(self) -> Point:
        """Where activations are read."""
        return Point.parse(self.config.point)

    @property
    def prompt_ids(self) -> Int[Tensor, "1 t"]:
        """The encoder's prompt, the same for every activation."""
        return self.encoder.prompt_ids

    @property
    def marker_position(self) -> int:
        """Column of the marker in the prompt."""
        return self.encoder.marker_position

    @property
    def pad_id(self) -> int:
        """Token id that fills batches up."""
        return self.encoder.pad_id

    @classmethod
    def create(
        cls,
        target_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: NLAConfig,
        rank: int = 32,
        alpha: float | None = None,
        baselines: Mapping[str, Baseline] | None = None,
    ) -> NLA:
        """An untrained pair on a target: adapters that change nothing yet, and an identity head.

        Both adapters reach every linear layer of the blocks, the decoder's only those up to the point. The target's
        parameters are frozen. The adapters' random halves come from the global random state.

        Args:
            target_model: a transformers causal LM without adapters; it is wrapped in place.
            config: its ``target`` says where ``target_model`` is from: an embedded name, GGUF file, folder or hub id.
            rank: of both adapters.
            alpha: LoRA's scale numerator; None: ``rank``, so that the scale is 1.
            baselines: see :attr:`baselines`; :meth:`score` needs "global".
        """
        if rank < 1:
            raise ArgumentError(f"rank={rank}", "1 or more", "give the adapters a positive rank")
        block(target_model, config.point)
        check_stream(target_model)
        ends = config.end_ids or ends_of(target_model, tokenizer) or None
        source = noted_target(config.target)
        config = replace(config, target=source, files={}, target_weights=hash_target(source), end_ids=ends)
        roles = SharedBase.create(target_model, config, rank, alpha)
        pair = cls(roles, tokenizer, config, baselines)
        pair.target_folder = folder.resolve() if (folder := local_folder(source)) else None
        return pair

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        device: Devices = None,
        trust_remote_code: bool = False,
    ) -> NLA:
        """A trained pair and its target.

        Args:
            name_or_path: "couplets" (the embedded organism), a folder, or a hub id.
            revision: of a pair on the hub; the target's is in the pair's config.
            device: where to put it; None: the first GPU if there is one, else the CPU. Of separate models also a place
                for each role, such as {"target": "cuda:0", "encoder": "cuda:1", "decoder": "cpu"}.
            trust_remote_code: let a target on the hub bring its own code.

        Raises:
            ConfigError: a file is missing, malformed or edited; or the config contradicts the target.
            TokenizerMismatchError, MarkerError: the target's tokenizer is not the one of training.
            WeightsError: weights are missing, truncated, corrupt, or of other names or shapes.
            NonFiniteError: weights hold NaN or infinity.
            HubError, AccessError, TargetError: the hub lacks it, does not open it, or cannot be reached.
        """
        return cls.from_parts(pair_folder.load(name_or_path, revision, device, trust_remote_code))

    @classmethod
    def from_parts(cls, parts: Parts) -> NLA:
        """A pair put together from what was loaded.

        Raises:
            ConfigError, TokenizerMismatchError, MarkerError: the parts do not fit each other.
        """
        pair = cls(parts.roles, parts.tokenizer, parts.config, parts.baselines, parts.metrics)
        pair.target_folder, pair.weight_folders = parts.target_folder, dict(parts.weight_folders)
        pair.origin = parts.origin
        return pair

    @property
    def parts(self) -> Parts:
        """The pair in pieces, as it is saved and published."""
        return Parts(
            self.roles,
            self.tokenizer,
            self.config,
            self.baselines,
            self.metrics,
            self.target_folder,
            self.weight_folders,
            self.origin,
        )

    def save_pretrained(self, folder: str | Path, adapter_dtype: torch.dtype | None = None) -> None:
        """Write the pair as a native folder (see nla/pair/folder.py); the target is referred to, not copied.

        Everything is written aside first, so a full disk leaves an earlier pair untouched. A local target is noted
        relative to ``folder``. A README.md that is there already is kept.

        Args:
            adapter_dtype: to round both adapters' weights to, such as ``torch.bfloat16`` for half the size; None: as
                they are. The head stays float32.

        Raises:
            ArgumentError: ``adapter_dtype`` is no floating-point type, or the pair has no adapters.
            StorageError: it could not be written whole.
            NonFiniteError: a weight holds NaN or infinity; nothing is written.
        """
        pair_folder.save(self.parts, Path(folder), adapter_dtype)

    def push_to_hub(
        self, repo_id: str, private: bool = False, revision: str | None = None, commit_message: str | None = None
    ) -> str:
        """Publish the pair as a repository of its own, with its model card; returns the commit's address.

        The token is that of `hf auth login` or HF_TOKEN. The repository is made if there is none. A card that the pair
        was loaded with is kept, but for its header and generated part.

        Args:
            repo_id: such as "someone/pair".
            revision: a branch, made if there is none; None: main.

        Raises:
            ConfigError: the target or other weights lie in a folder of this machine.
            HubError, AccessError: the hub refuses, or cannot be reached.
        """
        return publish.push(self.parts, repo_id, private, revision, commit_message)

    def fit_baselines(self, acts: Activations | Store) -> None:
        """Take the mean and variance of activations as FVE's denominators, all together and by stratum.

        For a pair that came without: the activations must be typical of its training ones, and not those that are
        scored; a store gives the figures of its training split. Reconstructions are then as long as they on average.

        Raises:
            StoreError, TokenizerMismatchError: a store of another target or point; see :meth:`check_store`.
            ShapeError, NonFiniteError: not the pair's width, or not finite.
            BaselineError: fewer than two activations, or no variance.
        """
        if isinstance(acts, Store):
            self.check_store(acts)
        self.baselines, norm = denominators(acts, self.config)
        self.config = replace(self.config, activation_norm=norm)

    def check_store(self, store: Store) -> None:
        """Refuse a store whose activations are not of this pair's target and point.

        Raises:
            StoreError, ShapeError, TokenizerMismatchError: see :func:`nla.pair.score.check_store`.
        """
        check_store(store, self.config, self.tokenizer, self.target_folder)

    @property
    def doubts(self) -> list[str]:
        """What the pair's own measurements say against it, if anything (:func:`nla.pair.card.doubt`)."""
        said = doubt(self.metrics)
        return [] if said is None else [said]

    def __repr__(self) -> str:
        kind = "whole models" if self.config.separate else "adapters on the target"
        about = f"{self.config.target} at {self.config.point}, width {self.config.d_model}, {kind}"
        return f"NLA({'; '.join([visible(about), headline(self.metrics), *self.doubts])})"

    # Roles

    @contextlib.contextmanager
    def role(self, name: Role) -> Iterator[NLA]:
        """While active, ``model`` plays this role: the only place that switches adapters.

        On a shared base exactly the role's adapter is active and trainable ("target": none). Span forward AND backward:
        a switch between them loses gradients. Roles nest; on exit the adapters and every ``requires_grad`` are as they
        were. Another thread waits until this one's roles have ended.

        Raises:
            ArgumentError: another name.
        """
        check_role(name)
        with self.roles.play(name):
            yield self

    @property
    def model(self) -> PreTrainedModel:
        """What plays the role in force; outside of any role the shared base with its adapters, or else the target."""
        return self.roles.model

    @property
    def base(self) -> PreTrainedModel:
        """The causal LM of :attr:`model`, without the wrapper that PEFT puts around a shared base."""
        return unwrapped(self.model)

    def base_of(self, name: Role) -> PreTrainedModel:
        """The causal LM that plays a role, in force or not; of a separate decoder its backbone."""
        return unwrapped(self.roles.model_of(name))

    @property
    def head(self) -> Head:
        """The decoder's head."""
        return self.roles.head

    @contextlib.contextmanager
    def planted(self, adapter: str | Path | None) -> Iterator[NLA]:
        """While active, the target is read with a LoRA adapter on it; encoder and decoder stay as they are.

        Args:
            adapter: a PEFT folder or a hub id; None: the target itself.

        Raises:
            ConfigError, WeightsError, ArgumentError, TargetError, AccessError: see :func:`nla.pair.roles.planted`.
        """
        with planted(self.roles, adapter):
            yield self

    def require_adapters(self, what: str) -> SharedBase:
        """The shared base that ``what`` needs, such as "joint training".

        Raises:
            SeparateModelsError: encoder and decoder are whole models of their own.
        """
        return require_shared(self.roles, what)

    @property
    def device(self) -> torch.device:
        """Where :attr:`model` is."""
        return device_of(self.model)

    @property
    def n_parameters(self) -> dict[str, int]:
        """Number of parameters: of the target, of each adapter (the decoder's with its head).

        Of separate models: of each one that is loaded so far.
        """
        return self.roles.n_parameters()

    # Text to activations to explanations

    def read(
        self,
        texts: str | Path | Transcript | Mapping[str, object] | Sequence[str] | Sequence[Mapping[str, object]],
        positions: Positions = "all",
        strata: Strata | None = None,
        intervene: Intervene | None = None,
        progress: bool = False,
    ) -> Activations:
        """The target's activations of texts at the pair's point. See :func:`nla.models.read.read`.

        Args:
            texts: one or several; or chats, which are rendered with the target's chat template and read as its own
                tokens: a transcript, a list of messages, or a file of either.

        Raises:
            TranscriptError, TemplateError: see :func:`nla.transcripts.prepared.chats_of`.
            NLAError: see :func:`nla.models.read.read`.
        """
        plain = isinstance(texts, str) or (isinstance(texts, Sequence) and all(isinstance(one, str) for one in texts))
        written: Any = texts if plain else [chat.encoded for chat in chats_of(self.tokenizer, cast(Any, texts))]
        with self.role("target"):
            return read(
                self.model, self.tokenizer, written, self.point, positions, strata, intervene, progress=progress
            )

    def explain(
        self,
        acts: Activations | Vectors,
        samples: int = 4,
        temperature: float = 1.0,
        seed: int | Sequence[int] | None = 0,
        max_new_tokens: int | None = None,
        batch_size: int = 512,
        greedy: bool = False,
        watch: Watch | None = None,
    ) -> Explanations:
        """Explain activations: sampled texts, how well each reconstructs its activation, and how far to trust them.

        Args:
            acts: activations, or vectors.
            samples: how many explanations of each activation.
            temperature: of sampling; the pair was trained at 1.
            seed: of the samples. Each activation has a random source of its own, by the seed and its place in its text
                (by its values, where only vectors are given): what else is explained does not change its samples. A
                list gives each its own seed; None draws from the global random state.
            max_new_tokens: longest answer; None: as the pair's config says.
            batch_size: explanations that are sampled together.
            greedy: one sample, the likeliest text, whatever ``samples`` says.
            watch: sees the answers grow, and may end some; of activation i they are ``i * samples`` and those after it.

        Raises:
            NLAError: see :meth:`nla.pair.encoder.Encoder.generate`.
        """
        vectors, samples = vectors_of(acts), 1 if greedy else samples
        known = acts if isinstance(acts, Activations) else None
        seed = whole_seeds(seed)
        seed = seeds_of(seed, known, vectors) if isinstance(seed, int) else seed
        written = self.encoder.generate(vectors, samples, temperature, max_new_tokens, seed, greedy, batch_size, watch)
        predicted = self.decoder.decode([*written.explanations, ""], strict=False)
        # The same in every call: a margin does not depend on what else is explained with an activation.
        baselines = cosine_of_ignorance(vectors, predicted[-1], self.baselines)
        cosines = cosine(vectors.repeat_interleave(samples, dim=0), predicted[:-1]).reshape(-1, samples)
        return judge(written.explanations, written.complete, cosines, baselines, known)

    # Explanations to reconstructions

    def reconstruct(
        self,
        explanations: Explanations | str | Sequence[str] | Sequence[Sequence[str]],
        per_sample: bool = False,
        strict: bool = True,
    ) -> Tensor:
        """Reconstructions (n, d) float32 from explanations alone.

        With several samples of an activation: the mean of their unit reconstructions. Every reconstruction has the
        length ``config.activation_norm``: an explanation carries direction only.

        Args:
            explanations: what :meth:`explain` gave, one text per activation, or a list of samples per activation.
            per_sample: (n, samples, d) instead of means.
            strict: refuse empty texts, unknown words and texts beyond the context. What :meth:`explain` gave is never
                refused: what the encoder sampled is a bad explanation at worst.

        Raises:
            EmptyTextError: a text is empty.
            ArgumentError: an activation has no sample, or a text is no text (see :func:`nla.text.tokens.check_texts`).
            ShapeError: ``per_sample`` with different numbers of samples.
            ContextLengthError, VocabularyError: a text is too long, or holds unknown words.
        """
        if isinstance(explanations, Explanations):
            return self.decoder.decode_groups(explanations.texts, per_sample, strict=False)
        return self.decoder.decode_groups(explanations, per_sample, strict)

    def encode_explanations(self, texts: Sequence[str], strict: bool = True) -> DecoderBatch:
        """Decoder prompts of explanations as one batch. See :meth:`nla.pair.decoder.Decoder.encode_explanations`."""
        return self.decoder.encode_explanations(texts, strict)

    def decode_ids(self, input_ids: Int[Tensor, "n t"], attention_mask: Int[Tensor, "n t"]) -> Float[Tensor, "n d"]:
        """The decoder's output for its prompts, differentiable. See :meth:`nla.pair.decoder.Decoder.decode_ids`."""
        return self.decoder.decode_ids(input_ids, attention_mask)

    def score(
        self,
        acts: Activations | Vectors,
        predicted: Vectors,
        n_boot: int = 1000,
        seed: int = 0,
    ) -> Score:
        """Score reconstructions of activations, beside the baselines. See :class:`nla.pair.score.Score`.

        What is scored is what :meth:`reconstruct` gives: with several samples, their mean reconstruction, which is
        closer than a single sample's. FVE is over the training baselines: all positions, and each stratum its own.

        Raises:
            ShapeError, NonFiniteError, BaselineError: see :func:`nla.pair.score.score`.
        """
        known = isinstance(acts, Activations)
        vectors = self.config.check_vectors(vectors_of(acts))
        strata = acts.strata if known else [UNKNOWN_STRATUM] * len(vectors)
        documents = acts.document if known else torch.arange(len(vectors))
        empty = self.decoder.decode([""], strict=False)[0]
        return score(vectors, vectors_of(predicted), strata, documents, self.baselines, empty, n_boot, seed)


def vectors_of(acts: Activations | Vectors) -> Float[Tensor, "n d"]:
    """The vectors of activations, or vectors in whatever form, in float32 on the CPU.

    Raises:
        ShapeError: no numbers, or rows of different lengths.
    """
    if isinstance(acts, Activations):
        return acts.vectors
    try:
        rows = acts if isinstance(acts, Tensor | np.ndarray) else np.asarray(acts, dtype=np.float32)
        return torch.as_tensor(rows).float().cpu()
    except (TypeError, ValueError) as error:
        got = f"vectors of type {type(acts).__name__} ({error})"
        raise ShapeError(got, "a tensor, an array or lists of numbers, (n, d)", "give rows of one length") from error


def seeds_of(seed: int, acts: Activations | None, vectors: Float[Tensor, "n d"]) -> list[int]:
    """A seed for each activation, by its place in its text, or by its values where no text is known.

    What :meth:`NLA.explain` makes of one seed: activations of several calls can be explained in one, with the same
    samples.
    """
    if acts is None:
        keys = [row.tobytes() for row in vectors.numpy()]
    else:
        texts = [hashlib.sha256(text.encode()).digest() for text in acts.texts]
        places = zip(acts.document.tolist(), acts.spans, strict=True)
        keys = [texts[document] + str(span.index).encode() for document, span in places]
    own = [hashlib.sha256(f"{seed}:".encode() + key).digest() for key in keys]
    return [int.from_bytes(digest[:8]) >> 1 for digest in own]
