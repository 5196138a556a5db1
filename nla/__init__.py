"""Natural-language autoencoders: read a language model's activations as text, and check the text against causes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nla.autoencoder import NLA as NLA
    from nla.config import InjectionConfig as InjectionConfig
    from nla.config import NLAConfig as NLAConfig
    from nla.errors import NLAError as NLAError
    from nla.metrics import Baseline as Baseline
    from nla.metrics import fve as fve
    from nla.models.read import Activations as Activations
    from nla.models.read import read as read
    from nla.pair.explanations import Explanation as Explanation
    from nla.pair.explanations import Explanations as Explanations
    from nla.pair.score import Score as Score

_HOMES = {
    "NLA": "nla.autoencoder",
    "NLAConfig": "nla.config",
    "InjectionConfig": "nla.config",
    "Activations": "nla.models.read",
    "read": "nla.models.read",
    "Explanation": "nla.pair.explanations",
    "Explanations": "nla.pair.explanations",
    "Score": "nla.pair.score",
    "Baseline": "nla.metrics",
    "fve": "nla.metrics",
    "NLAError": "nla.errors",
}

__all__ = [
    "NLA",
    "Activations",
    "Baseline",
    "Explanation",
    "Explanations",
    "InjectionConfig",
    "NLAConfig",
    "NLAError",
    "Score",
    "fve",
    "read",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: ``import nla`` itself loads neither torch nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nla' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
