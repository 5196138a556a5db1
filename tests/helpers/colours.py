"""How colours look: their contrast, and their distance as eyes without one kind of cone see them."""

from __future__ import annotations

import re

import numpy as np

SEEN_BY = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Matrices on linear RGB. Source: Machado, Oliveira and Fernandes 2009, severity 1."""
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = _TO_XYZ.sum(axis=1)


def linear(colour: str) -> np.ndarray:
    """ "#rrggbb" as linear RGB."""
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def mixed(colour: str, paper: str, share: float) -> str:
    """``share`` of a colour laid over another, as CSS mixes it."""
    parts = zip(*([int(one[at : at + 2], 16) for at in (1, 3, 5)] for one in (colour, paper)), strict=True)
    return "#" + "".join(f"{round(share * over + (1 - share) * under):02x}" for over, under in parts)


def contrast(one: str, other: str) -> float:
    """From 1 to 21, as WCAG 2 defines it."""
    light, dark = sorted((float(_TO_XYZ[1] @ linear(colour)) for colour in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def distance(one: str, other: str, seen_by: str) -> float:
    """ΔE (CIE 1976) between two colours as these eyes see them; about 2 is the least that anybody notices."""
    return float(np.linalg.norm(_lab(one, seen_by) - _lab(other, seen_by)))


def _lab(colour: str, seen_by: str) -> np.ndarray:
    rgb = np.clip(np.array(SEEN_BY[seen_by]) @ linear(colour), 0, 1)
    ratio = _TO_XYZ @ rgb / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def themes(css: str) -> dict[str, dict[str, str]]:
    """The custom properties that are colours, in light and in dark."""
    light, dark = css.split("@media (prefers-color-scheme: dark)", 1)
    found = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part.split("}", 1)[0])) for part in (light, dark)]
    return {"light": found[0], "dark": found[0] | found[1]}
