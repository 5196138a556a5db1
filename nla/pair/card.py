"""The model card of a pair: what its config and metrics.json hold, and "not measured" for what they lack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import yaml
from pydantic import AliasChoices, BaseModel, Field, JsonValue, ValidationError

from nla.config import NLAConfig
from nla.errors import ConfigError, ParseError, visible
from nla.organisms import PACKAGED
from nla.storage.files import parse_yaml
from nla.storage.schema import first_problem, shown

CARD_FILE = "README.md"
ABSENT = "not measured"
BEGIN, END = "<!-- card -->", "<!-- /card -->"
"""Around what is generated; :func:`renewed` leaves all else as it is."""
_TAGS = ("interpretability", "natural-language-autoencoder")
_DENOMINATOR = (
    "FVE = 1 − E|h − ĥ|² / E|h − h̄|², with h and ĥ scaled to unit length and h̄ the mean of the unit-length training "
    "activations, not rescaled"
)
_DIFFERENCES = {
    "joint_minus_warm": "FVE of the joint decoder minus that of the warm-start decoder, on the encoder's own texts",
    "truthful_minus_encoder": "FVE of a truthful reader's texts minus that of the encoder's, under the joint decoder",
}


class _Interval(BaseModel):
    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{_number(self.value)}{ends}"


class _Stratum(BaseModel):
    fve: _Interval


class _Score(BaseModel):
    n: int
    fve: _Interval
    cosine: _Interval
    by_stratum: dict[str, _Stratum] = {}
    baselines: dict[str, _Interval] = Field(default={}, validation_alias=AliasChoices("baselines", "rocks"))
    """In metrics.json of 0.3 and before under another name."""


class _Figures(BaseModel):
    """What of metrics.json a card shows."""

    score: _Score | None = None
    joint: dict[str, JsonValue] | None = None
    data: str | None = None
    recipe: str | None = None

    def joint_figure(self, name: str) -> float | None:
        """A number of joint training; None: there is none."""
        value = (self.joint or {}).get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def card(metrics: Mapping[str, object], config: NLAConfig, name: str = "<this folder>", local: bool = True) -> str:
    """A README.md with the hub's header.

    Args:
        metrics: what metrics.json holds. Read are "recipe", "data" (a text), "score"
            (:meth:`nla.pair.score.Score.to_json` on activations that were not trained on) and "joint" (what
            ``nla train`` writes).
        name: what the pair is loaded by.
        local: the target lies in a folder; the header then names no base model.

    Raises:
        ConfigError: metrics.json does not hold such figures.
    """
    try:
        figures = _figures(metrics)
    except ValidationError as error:
        problem = first_problem(error, _Figures)
        fix = "restore the file, or delete it and measure the pair again"
        raise ConfigError(f"metrics.json with {problem.got}", problem.expected, fix) from error
    against = doubt(metrics)
    parts = [
        *([] if against is None else [f"**Do not use: {against}.**"]),
        _what(config, name),
        _fidelity(figures),
        _baselines(figures),
        _public(figures),
        _data(figures),
        _limits(config),
    ]
    body = "\n\n".join(parts)
    return f"{_header(config, local)}\n\n{BEGIN}\n{body}\n{END}\n"


def doubt(metrics: Mapping[str, object]) -> str | None:
    """What a pair's measurements say against it: that its FVE is not above its baselines' ("mean", 0, is one of them).
    None: nothing, or nothing was measured."""
    try:
        figures = _figures(metrics)
    except ValidationError:
        return None
    score = figures.score
    fve = figures.joint_figure("fve/global") if score is None else score.fve.value
    measured = (
        {} if score is None else {name: one.value for name, one in score.baselines.items() if one.value is not None}
    )
    name, best = max(measured.items(), key=lambda one: one[1], default=("mean", 0.0))
    if fve is None or fve > best:
        return None
    return f"this pair reads nothing: its FVE is {fve:.2f}, and that of the baseline {name!r} is {best:.2f}"


def headline(metrics: Mapping[str, object]) -> str:
    """A pair's fidelity in a few words.

    >>> headline({"joint": {"fve/global": 0.5}}), headline({})
    ('FVE 0.500', 'FVE not measured')
    """
    try:
        figures = _figures(metrics)
    except ValidationError:
        return "FVE not known: its metrics.json does not hold such figures"
    if figures.score is None:
        return f"FVE {_number(figures.joint_figure('fve/global'))}"
    return f"FVE {figures.score.fve}, cosine {figures.score.cosine}"


def _figures(metrics: Mapping[str, object]) -> _Figures:
    return _Figures.model_validate({key: metrics[key] for key in _Figures.model_fields if key in metrics})


def renewed(old: str, new: str) -> str:
    """A card ``old`` with the header and the generated part of ``new``, a card that :func:`card` just made.

    Everything else is kept: what stands before and after the generated part, and lines of the header such as a
    licence. Where the marks of the generated part are gone, somebody wrote the card anew: only its header is renewed.

    Raises:
        ConfigError: the header of ``old`` is not YAML.
    """
    (old_header, old_body), (header, body) = _parted(old), _parted(new)
    if not old_body.strip():
        return new
    fix = "correct the card"
    try:
        kept = parse_yaml(old_header, f"the header of {CARD_FILE}", foreign=True) or {}
    except ParseError as error:
        raise ConfigError(error.got, "YAML between two lines of ---", fix) from error
    tags = kept.get("tags") or [] if isinstance(kept, dict) else None
    if isinstance(tags, str):
        tags = [tags]
    if not isinstance(tags, list):
        got = f"a {CARD_FILE} with the header {shown(kept)}"
        raise ConfigError(got, "keys and values, and as tags a text or a list", fix)
    fresh = yaml.safe_load(header)
    merged = {**kept, **fresh, "tags": [*fresh["tags"], *(t for t in tags if t not in fresh["tags"])]}
    before, begin, rest = old_body.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        old_body = before + body[body.index(BEGIN) : body.index(END)] + end + after
    return f"---\n{yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)}---\n{old_body}"


def _parted(text: str) -> tuple[str, str]:
    """The YAML of a card's header, and what follows it."""
    lines = text.splitlines(keepends=True)
    ends = [n for n, line in enumerate(lines) if line.rstrip() == "---"]
    if len(ends) < 2 or ends[0] != 0:
        return "", text
    return "".join(lines[1 : ends[1]]), "".join(lines[ends[1] + 1 :])


def _header(config: NLAConfig, local: bool) -> str:
    package = PACKAGED.get(config.target)
    content = {} if local else {"base_model": config.target if package is None else package.ORIGINAL}
    content |= {"library_name": "nla", "tags": list(_TAGS)}
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _what(config: NLAConfig, name: str) -> str:
    revision = f" at revision `{config.target_revision}`" if config.target_revision else ""
    kind = "whole models" if config.separate else "adapters on the target"
    quantised = f", quantised to {config.quantization}" if config.quantization else ""
    return f"""# A natural-language autoencoder

Explains activations of `{config.target}`{revision} at `{config.point}` (width {config.d_model}, {config.dtype}\
{quantised}) in words, and reconstructs them from the words alone. Encoder and decoder are {kind}.

    from nla import NLA
    nla = NLA.from_pretrained("{name}")
    acts = nla.read("...some text...")
    notes = nla.explain(acts, samples=4)
    print(nla.score(acts, nla.reconstruct(notes)))"""


def _fidelity(figures: _Figures) -> str:
    rows: list[tuple[str, str]] = []
    score, joint = figures.score, figures.joint
    if score is not None:
        rows = [("FVE", str(score.fve)), ("cosine", str(score.cosine))]
        rows += [(f"FVE in {stratum}", str(part.fve)) for stratum, part in score.by_stratum.items()]
        note = f"On {score.n} activations"
    else:
        strata = [key for key in joint or {} if key.startswith("fve/") and key != "fve/global"]
        rows = [("FVE", _number(figures.joint_figure("fve/global")))]
        rows += [(f"FVE in {key.removeprefix('fve/')}", _number(figures.joint_figure(key))) for key in strata]
        note = "On the texts held out in joint training" if joint else "No figures are in metrics.json"
    about = f"{note}. {_DENOMINATOR}; a stratum's own mean and variance within a stratum."
    return f"## Fidelity\n\n{about}\n\n{_table(('measured', 'value'), rows)}"


def _baselines(figures: _Figures) -> str:
    measured = {} if figures.score is None else figures.score.baselines
    names = {
        "empty": "the decoder without an explanation",
        "shuffled": "another activation's reconstruction",
        "other_document": "a reconstruction from another document",
        "mean": "the mean training activation",
    }
    rows = [(what, str(measured.get(key, ABSENT))) for key, what in names.items()]
    return f"## Baselines: FVE of what never saw the activation\n\n{_table(('baseline', 'FVE'), rows)}"


def _public(figures: _Figures) -> str:
    rows = [(what, _number(figures.joint_figure(f"difference/{key}/global"))) for key, what in _DIFFERENCES.items()]
    return (
        "## Is the code public?\n\nFVE cannot tell words that mean what they say from a private code; two differences "
        f"can, and both are near zero for a public one.\n\n{_table(('difference', 'value'), rows)}"
    )


def _data(figures: _Figures) -> str:
    data, recipe = (visible(text or "") for text in (figures.data, figures.recipe))
    return f"## Data\n\nTrained on: {data or 'not recorded'}. Recipe: {f'`{recipe}`' if recipe else 'not recorded'}."


def _limits(config: NLAConfig) -> str:
    return f"""## Limits

- Explanations can be fluent and wrong: read them with their trust, and check them against causes.
- An explanation carries the direction of an activation, not its length.
- It holds for `{config.point}` of this target alone; on a fine-tuned target measure before you trust the text.

All figures: `metrics.json`; what `nla eval ... --card <this folder>` found stands below."""


def _number(value: float | None) -> str:
    return ABSENT if value is None or not math.isfinite(value) else f"{value:.3f}"


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *((visible(cell).replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)
