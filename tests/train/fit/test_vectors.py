"""Vectors that stay where they are, indexed like one tensor."""

from __future__ import annotations

import pytest
import torch

from nla.errors import NonFiniteError, ShapeError
from nla.train.fit import vectors as module
from nla.train.fit.vectors import MOST_ROWS, Chosen, Joined, check_directions, chunks, draw_by_weight, identity

FIRST, SECOND = torch.randn(7, 3), torch.randn(5, 3)


class Stored:
    """Rows with an identity, as a store's: none is read unless it is asked for."""

    shape, identity = (4, 3), "a hash"

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        raise AssertionError("a stored vector was read")


def test_joined_and_chosen_rows_are_those_of_one_tensor(monkeypatch):
    whole, rows = torch.cat([FIRST, SECOND]), torch.tensor([11, 0, 6, 7, 6])
    joined = Joined(FIRST, SECOND)
    assert joined.shape == (12, 3) and len(joined) == 12
    assert torch.equal(joined[rows], whole[rows])
    assert torch.equal(Chosen(joined, rows)[torch.tensor([1, 4])], whole[rows][[1, 4]])
    monkeypatch.setattr(module, "CHUNK", 5)
    assert [len(part) for part in chunks(joined)] == [5, 5, 2]
    assert torch.equal(torch.cat(list(chunks(joined))), whole)


def test_vectors_of_different_width_are_not_joined():
    with pytest.raises(ShapeError, match="width 4"):
        Joined(FIRST, torch.zeros(2, 4))


def test_a_store_stands_for_its_vectors_and_is_not_read():
    rows = torch.tensor([2, 3])
    assert list(identity(Stored())) == ["a hash"]
    told = list(identity(Joined(Chosen(Stored(), rows), FIRST)))
    assert torch.equal(told[0], rows) and told[1] == "a hash" and torch.equal(told[2], FIRST)
    check_directions(Chosen(Stored(), rows))


def test_vectors_without_a_direction_are_refused_wherever_they_are():
    bad = SECOND.clone()
    bad[3] = 0
    with pytest.raises(NonFiniteError):
        check_directions(Joined(FIRST, bad))
    check_directions(Chosen(bad, torch.tensor([0, 1])))


def test_more_rows_than_multinomial_takes_are_drawn_by_their_weights():
    weights = torch.zeros(MOST_ROWS + 9, dtype=torch.float64)
    weights[[3, 70, -1]] = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    for replacement in (False, True):
        drawn = draw_by_weight(weights, 3, replacement, torch.Generator().manual_seed(0))
        assert set(drawn.tolist()) <= {3, 70, MOST_ROWS + 8}
        assert replacement or len(set(drawn.tolist())) == 3


@pytest.mark.parametrize("replacement", [False, True])
def test_draws_of_many_rows_have_the_distribution_of_multinomial(replacement, monkeypatch):
    weights = torch.tensor([0.0, 1.0, 2.0, 4.0, 0.0, 1.0])

    def shares():
        generator, counts = torch.Generator().manual_seed(0), torch.zeros(2, 6)
        for _ in range(4000):
            first, second = draw_by_weight(weights, 2, replacement, generator).tolist()
            assert replacement or first != second
            counts[0, first] += 1
            counts[1, second] += 1
        return counts / 4000

    expected = shares()
    monkeypatch.setattr(module, "MOST_ROWS", 3)
    assert (shares() - expected).abs().max() < 0.03
    assert shares()[:, weights == 0].sum() == 0
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(*(draw_by_weight(weights, 2, replacement, generator) for generator in generators))
