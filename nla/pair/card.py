"""The model card of a pair: what its config and metrics.json hold, and "not measured" for what they lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nla.config import NLAConfig
from nla.errors import ConfigError

CARD_FILE = "README.md"
ABSENT = "not measured"
BEGIN, END = "<!-- card -->", "<!-- /card -->"
"""Around what is generated; :func:`renewed` leaves all else as it is."""
_TAGS = ("interpretability", "natural-language-autoencoder")
_DENOMINATOR = (
    "FVE = 1 − E|h − ĥ|² / E|h − h̄|², with h and ĥ scaled to unit length and h̄ the mean of the unit-length training "
    "activations, not rescaled"
)
_OLD_BASELINES_KEY = "rocks"
"""What metrics.json of 0.3 and before calls the baselines."""
_DIFFERENCES = {
    "joint_minus_warm": "FVE of the joint decoder minus that of the warm-start decoder, on the encoder's own texts",
    "truthful_minus_encoder": "FVE of a truthful reader's texts minus that of the encoder's, under the joint decoder",
}


def card(metrics: Mapping[str, object], config: NLAConfig, name: str = "<this folder>", local: bool = True) -> str:
    """A README.md with the hub's header.

    Args:
        metrics: what metrics.json holds. Read are "recipe", "data" (a text), "score"
            (:meth:`nla.pair.score.Score.to_json` on activations that were not trained on) and "joint" (what
            ``nla train`` writes).
        name: what the pair is loaded by.
        local: the target lies in a folder; the header then names no base model.
    """
    parts = [
        _what(config, name),
        _figures(metrics),
        _baselines(metrics),
        _public(metrics),
        _data(metrics),
        _limits(config),
    ]
    body = "\n\n".join(parts)
    return f"{_header(config, local)}\n\n{BEGIN}\n{body}\n{END}\n"


def renewed(old: str, new: str) -> str:
    """A card ``old`` with the header and the generated part of ``new``, a card that :func:`card` just made.

    Everything else is kept: what stands before and after the generated part, and lines of the header such as a
    licence. Where the marks of the generated part are gone, somebody wrote the card anew: only its header is renewed.

    Raises:
        ConfigError: the header of ``old`` is not YAML.
    """
    import yaml

    (old_header, old_body), (header, body) = _parted(old), _parted(new)
    if not old_body.strip():
        return new
    try:
        kept = yaml.safe_load(old_header) or {}
        if not isinstance(kept, dict):
            raise ValueError(f"a {type(kept).__name__}")
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"a {CARD_FILE} whose header cannot be read ({error})", "YAML between two lines of ---", "correct the card"
        ) from error
    fresh = yaml.safe_load(header)
    tags = kept.get("tags") or []
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
    base = [] if local else [f"base_model: {config.target}"]
    tags = ["tags:", *(f"- {tag}" for tag in _TAGS)]
    return "\n".join(["---", *base, "library_name: nla", *tags, "---"])


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


def _figures(metrics: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    score, joint = metrics.get("score"), metrics.get("joint") or {}
    if score:
        rows = [("FVE", _interval(score["fve"])), ("cosine", _interval(score["cosine"]))]
        rows += [(f"FVE in {stratum}", _interval(part["fve"])) for stratum, part in score["by_stratum"].items()]
        note = f"On {score['n']} activations"
    else:
        rows = [("FVE", _number(joint.get("fve/global")))]
        rows += [
            (f"FVE in {key.removeprefix('fve/')}", _number(value))
            for key, value in joint.items()
            if key.startswith("fve/") and key != "fve/global"
        ]
        note = "On the texts held out in joint training" if joint else "No figures are in metrics.json"
    about = f"{note}. {_DENOMINATOR}; a stratum's own mean and variance within a stratum."
    return f"## Fidelity\n\n{about}\n\n{_table(('measured', 'value'), rows)}"


def _baselines(metrics: Mapping[str, Any]) -> str:
    score = metrics.get("score") or {}
    measured = score.get("baselines", score.get(_OLD_BASELINES_KEY, {}))
    names = {
        "empty": "the decoder without an explanation",
        "shuffled": "another activation's reconstruction",
        "other_document": "a reconstruction from another document",
        "mean": "the mean training activation",
    }
    rows = [(what, _interval(measured[key]) if key in measured else ABSENT) for key, what in names.items()]
    return f"## Baselines: FVE of what never saw the activation\n\n{_table(('baseline', 'FVE'), rows)}"


def _public(metrics: Mapping[str, Any]) -> str:
    joint = metrics.get("joint") or {}
    rows = [(what, _number(joint.get(f"difference/{key}/global"))) for key, what in _DIFFERENCES.items()]
    return (
        "## Is the code public?\n\nFVE cannot tell words that mean what they say from a private code; two differences "
        f"can, and both are near zero for a public one.\n\n{_table(('difference', 'value'), rows)}"
    )


def _data(metrics: Mapping[str, Any]) -> str:
    data, recipe = metrics.get("data"), metrics.get("recipe")
    return f"## Data\n\nTrained on: {data or 'not recorded'}. Recipe: {f'`{recipe}`' if recipe else 'not recorded'}."


def _limits(config: NLAConfig) -> str:
    return f"""## Limits

- Explanations can be fluent and wrong: read them with their trust, and check them against causes.
- An explanation carries the direction of an activation, not its length.
- It holds for `{config.point}` of this target alone; on a fine-tuned target measure before you trust the text.

All figures: `metrics.json`; what `nla eval ... --card <this folder>` found stands below."""


def _interval(interval: Mapping[str, Any]) -> str:
    if interval.get("low") is None:
        return _number(interval["value"])
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _number(value: Any) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)
