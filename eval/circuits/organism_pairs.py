"""The minimal pairs of the embedded organisms, and where each of their targets was made to use its latent."""

from __future__ import annotations

from typing import NamedTuple

from nla.errors import ArgumentError
from nla.eval.circuits.minimal_pairs import MinimalPair, of_items
from nla.eval.couplet_items import rhyme_items
from nla.eval.families import two_hop
from nla.eval.target import Target
from nla.eval.worlds import COUPLETS, SWITCHBOARD, world_of
from nla.models.points import Point


class PlantedSite(NamedTuple):
    """Where an embedded target was made to use its latent."""

    point: str | None
    """The one point; None: at none."""
    role: str | None = None
    """The token's role; None: the prompt's last token."""
    upstream: str | None = None
    """The role that the planted token reads the latent from, in the blocks below."""

    def reads(self, point: str, role: str) -> bool:
        """Whether a site is one that the planted one reads the latent from."""
        if self.point is None or role != self.upstream:
            return False
        return Point.parse(point).layer < Point.parse(self.point).layer


PLANTED_SITES = {
    "couplets/planner": PlantedSite("resid_post.3"),
    "couplets/plain": PlantedSite(None),
    "switchboard/target": PlantedSite("resid_post.3", "full stop", "name"),
}


def organism_pairs(name: str, target: Target, n_pairs: int, seed: int) -> list[MinimalPair]:
    """The minimal pairs of an organism: rhyme plans of Couplets, two-hop questions of Switchboard.

    Raises:
        ArgumentError: the target is neither.
    """
    world = world_of(target.tokenizer)
    if world == COUPLETS:
        return of_items(target, rhyme_items(n_pairs, seed))
    if world == SWITCHBOARD:
        return two_hop.pairs_of(two_hop.hops(n_pairs, seed))
    raise ArgumentError(
        f"no pairs for {name}, of no embedded world",
        "minimal pairs of your own",
        "give a file of pairs (--pairs), or one pair (--prompt and the three other texts)",
    )
