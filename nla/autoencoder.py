"""NLA: target, encoder and decoder on one base; read, explain, reconstruct, score, save, load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla.baselines import GLOBAL
from nla.config import NLAConfig
from nla.errors import ArgumentError, ShapeError
from nla.metrics import Baseline, check_finite, cosine, unit
from nla.models import generate
from nla.models import read as activations
from nla.models.forward import device_of
from nla.models.hooks import locate_marker
from nla.models.points import Point, block
from nla.models.read import Activations, Intervene, Strata
from nla.pair import decoder, encoder, publish
from nla.pair import folder as pair_folder
from nla.pair.confidence import Trust, agreement
from nla.pair.decoder import DecoderBatch, Head
from nla.pair.denominators import denominators
from nla.pair.explanations import Explanation, Explanations
from nla.pair.roles import DECODER_ADAPTER as DECODER_ADAPTER
from nla.pair.roles import ENCODER_ADAPTER as ENCODER_ADAPTER
from nla.pair.roles import Role, Roles, SharedBase, check_role, require_shared, unwrapped
from nla.pair.score import Score, score
from nla.pair.separate import Devices
from nla.storage import hub
from nla.storage.hashes import hash_weights
from nla.store.reader import Store
from nla.text import claims
from nla.text.tokens import Positions, render_prompt


class NLA:
    """A natural-language autoencoder: target, encoder and decoder.

    In a pair that is trained here one base plays all three roles: bare as the target, with the adapter "default" as the
    encoder, cut after the point with the adapter "decoder" and a head as the decoder. In a pair of imported full
    weights each role has a model of its own, loaded at first use. See nla/roles.py.
    """

    def __init__(
        self,
        roles: Roles,
        tokenizer: Any,
        config: NLAConfig,
        baselines: Mapping[str, Baseline] | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        """Put the parts together; most callers want :meth:`from_pretrained` or :meth:`create`.

        Raises:
            ConfigError, TokenizerMismatchError, MarkerError: the config does not fit the tokenizer or the model.
        """
        config.check_tokenizer(tokenizer)
        if roles.shared:
            config.check_model(roles.model.config)
        self.roles, self.tokenizer, self.config = roles, tokenizer, config
        self.baselines: dict[str, Baseline] = dict(baselines or {})
        """Of unit-normalised training activations, by stratum, and "global"."""
        self.metrics: dict[str, Any] = dict(metrics or {})
        """What was measured, as saved in metrics.json."""
        self.target_folder: Path | None = None
        """Where a local target lies; :meth:`save_pretrained` writes it relative to the pair's folder."""
        self.weight_folders: dict[str, Path] = {}
        """Where the full weights of a local encoder and decoder lie, by role."""
        self.origin: tuple[str, str | None] | None = None
        """What it was loaded from: a folder's absolute path or a hub id, and the revision; None: made here."""
        self.point = Point.parse(config.point)
        self.prompt_ids = torch.tensor([render_prompt(tokenizer, config.encoder_prompt)])
        """The encoder's prompt, (1, t) int64; the same for every activation."""
        self.marker_position = int(locate_marker(self.prompt_ids, config.injection)[0])
        """Column of the marker in the prompt."""
        self.pad_id = generate.pad_of(tokenizer)
        """Token id that fills batches up."""

    @classmethod
    def create(
        cls,
        target_model: Any,
        tokenizer: Any,
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
            rank, alpha: of both adapters; ``alpha`` is LoRA's scale numerator, None: ``rank``, so that the scale is 1.
            baselines: see :attr:`baselines`; :meth:`score` needs "global".
        """
        if rank < 1:
            raise ArgumentError(f"rank={rank}", "1 or more", "give the adapters a positive rank")
        block(target_model, config.point)
        ends = config.end_ids or generate.ends_of(target_model, tokenizer) or None
        config = replace(config, files={}, target_weights=hash_weights(config.target), end_ids=ends)
        roles = SharedBase.create(target_model, config, rank, alpha)
        pair = cls(roles, tokenizer, config, baselines)
        pair.target_folder = Path(config.target).resolve() if Path(config.target).is_dir() else None
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
        pair = pair_folder.load(cls, name_or_path, revision, device, trust_remote_code)
        pair.origin = (hub.place_of(name_or_path), revision)
        return pair

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pair as a native folder (see nla/formats/native.py); the target is referred to, not copied.

        Everything is written aside first, so a full disk leaves an earlier pair untouched. A local target is noted
        relative to ``folder``. A README.md that is there already is kept.

        Raises:
            StorageError: it could not be written whole.
            NonFiniteError: a weight holds NaN or infinity; nothing is written.
        """
        pair_folder.save(self, Path(folder))

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
        return publish.push(self, repo_id, private, revision, commit_message)

    def fit_baselines(self, acts: Activations | Store) -> None:
        """Take the mean and variance of activations as FVE's denominators, all together and by stratum.

        For a pair that came without: the activations must be typical of its training ones, and not those that are
        scored; a store gives the figures of its training split. Reconstructions are then as long as they on average.

        Raises:
            StoreError, TokenizerMismatchError: a store of another target or point; see nla/denominator.py.
            ShapeError, NonFiniteError: not the pair's width, or not finite.
            BaselineError: fewer than two activations, or no variance.
        """
        self.baselines, norm = denominators(self, acts)
        self.config = replace(self.config, activation_norm=norm)

    # Roles

    @contextlib.contextmanager
    def role(self, name: Role) -> Iterator[NLA]:
        """While active, ``model`` plays this role: the only place that switches adapters.

        On a shared base exactly the role's adapter is active and trainable ("target": none). Span forward AND backward:
        a switch between them loses gradients. Roles nest; on exit the adapters and every ``requires_grad`` are as they
        were.

        Raises:
            ArgumentError: another name.
        """
        check_role(name)
        with self.roles.play(name):
            yield self

    @property
    def model(self) -> Any:
        """What plays the role in force; outside of any role the shared base with its adapters, or else the target."""
        return self.roles.model

    @property
    def base(self) -> Any:
        """The causal LM of :attr:`model`, without the wrapper that PEFT puts around a shared base."""
        return unwrapped(self.model)

    def base_of(self, name: Role) -> Any:
        """The causal LM that plays a role, in force or not; of a separate decoder its backbone."""
        return unwrapped(self.roles.model_of(name))

    @property
    def decoder_view(self) -> Any:
        """The decoder's backbone up to the point; of a shared base it shares parameters and adapters."""
        return self.roles.view

    @property
    def head(self) -> Head:
        """The decoder's head."""
        return self.roles.head

    @property
    def target_adapter(self) -> str | None:
        """Adapter that is on while the target is read, such as a plant's (see nla/plant.py); None: none."""
        return self.roles.target_adapter

    @target_adapter.setter
    def target_adapter(self, name: str | None) -> None:
        self.require_adapters("an adapter on the target").target_adapter = name

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
        texts: str | Sequence[str],
        positions: Positions = "all",
        strata: Strata | None = None,
        intervene: Intervene | None = None,
        progress: bool = False,
    ) -> Activations:
        """The target's activations of texts at the pair's point. See :func:`nla.activations.read`."""
        with self.role("target"):
            return activations.read(
                self.model, self.tokenizer, texts, self.point, positions, strata, intervene, progress=progress
            )

    def explain(
        self,
        acts: Activations | Tensor,
        samples: int = 4,
        temperature: float = 1.0,
        seed: int | None = 0,
        max_new_tokens: int | None = None,
        batch_size: int = 512,
        greedy: bool = False,
    ) -> Explanations:
        """Explain activations: sampled texts, how well each reconstructs its activation, and how far to trust them.

        Args:
            acts: activations, or vectors (n, d).
            greedy: one sample, the likeliest text, whatever ``samples`` says.

        The other arguments are those of :func:`nla.encoder.generate`, whose errors this raises too.
        """
        vectors = acts.vectors if isinstance(acts, Activations) else acts.float().cpu()
        samples = 1 if greedy else samples
        rollouts = encoder.generate(self, vectors, samples, temperature, max_new_tokens, seed, greedy, batch_size)
        parsed = [encoder.parse(text, self.config) for text in rollouts.texts]
        texts = [
            encoder.strip_tags(raw, self.config) if text is None else text
            for raw, text in zip(rollouts.texts, parsed, strict=True)
        ]
        predicted = decoder.decode(self, texts, strict=False)
        found = cosine(vectors.repeat_interleave(samples, dim=0), predicted).reshape(-1, samples)
        rocks = self._best_rock(vectors)
        notes = []
        for row, (cosines, rock) in enumerate(zip(found.tolist(), rocks.tolist(), strict=True)):
            part = slice(row * samples, (row + 1) * samples)
            mean = sum(cosines) / samples
            note = Explanation(
                texts=texts[part],
                complete=[text is not None for text in parsed[part]],
                cosine=cosines,
                trust=Trust.of(mean, agreement([claims.claims(text) for text in texts[part]]), mean - rock),
            )
            if isinstance(acts, Activations):
                note = replace(note, span=acts.spans[row], document=int(acts.document[row]), stratum=acts.strata[row])
            notes.append(note)
        return Explanations(notes)

    def _best_rock(self, vectors: Tensor) -> Tensor:
        """Highest cosine (n,) that a rock reaches on each activation: no explanation, or the mean training activation.

        Both are the same in every call, so an activation's margin does not depend on what else is explained with it.
        """
        rocks = [decoder.decode(self, [""], strict=False)[0]]
        if GLOBAL in self.baselines:
            rocks.append(self.baselines[GLOBAL].mean)
        return (unit(vectors) @ unit(torch.stack(rocks)).T).amax(dim=1)

    def check_width(self, vectors: Tensor) -> Tensor:
        """The vectors, if they are (n, d) of the target's width and finite.

        Raises:
            ShapeError, NonFiniteError: otherwise.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.config.d_model:
            raise ShapeError(
                f"vectors of shape {tuple(vectors.shape)}",
                f"(n, {self.config.d_model}), the width of {self.config.target}",
                f"read them with this pair, at {self.point}",
            )
        check_finite(vectors)
        return vectors

    # Explanations to reconstructions

    def reconstruct(
        self,
        explanations: Explanations | Sequence[str] | Sequence[Sequence[str]],
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
            ArgumentError: an activation has no sample, or a text is no text (see :func:`nla.tokens.check_texts`).
            ShapeError: ``per_sample`` with different numbers of samples.
            ContextLengthError, VocabularyError: a text is too long, or holds unknown words.
        """
        known = isinstance(explanations, Explanations)
        return decoder.decode_groups(
            self, explanations.texts if known else explanations, per_sample, strict=strict and not known
        )

    def encode_explanations(self, texts: Sequence[str], strict: bool = True) -> DecoderBatch:
        """Decoder prompts of explanations as one batch on its device. See :func:`nla.decoder.prompt_rows`."""
        batch = decoder.pad_batch(decoder.prompt_rows(self, texts, strict), self.pad_id)
        place = device_of(self.roles.model_of("decoder"))
        return DecoderBatch(batch.input_ids.to(place), batch.attention_mask.to(place))

    def decode_ids(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The decoder's output (n, d) float32 for prompts (n, t) padded on the right; differentiable, not rescaled.

        To be called inside ``role("decoder")``, which must span the backward pass too.

        Raises:
            ArgumentError: called in another role.
            ShapeError: the mask is not that of right padding.
        """
        if self.roles.playing != "decoder":
            raise ArgumentError(
                f"decode_ids in the role {self.roles.playing}",
                "the role 'decoder'",
                "write `with nla.role('decoder'):` around forward and backward, or call reconstruct for inference",
            )
        return self.head(decoder.last_stream(self.decoder_view, input_ids, attention_mask))

    def score(self, acts: Activations | Tensor, predicted: Tensor, n_boot: int = 1000, seed: int = 0) -> Score:
        """Score reconstructions (n, d) of activations, beside the baselines. See :class:`nla.score.Score`.

        What is scored is what :meth:`reconstruct` gives: with several samples, their mean reconstruction, which is
        closer than a single sample's. FVE is over the training baselines: all positions, and each stratum its own.

        Raises:
            ShapeError, NonFiniteError, BaselineError: see :func:`nla.score.score`.
        """
        known = isinstance(acts, Activations)
        vectors = self.check_width(acts.vectors if known else acts.float().cpu())
        strata = acts.strata if known else [activations.UNKNOWN_STRATUM] * len(vectors)
        documents = acts.document if known else torch.arange(len(vectors))
        empty = decoder.decode(self, [""], strict=False)[0]
        return score(vectors, predicted.cpu(), strata, documents, self.baselines, empty, n_boot, seed)
