"""The way of a text, counted: through which files it goes, from the command's hand back into it.

What counts as a stay is said in :func:`tests.helpers.ways.way`. The command's own room, ``nla/cli``, where a text is
taken in and a table comes out, is where the way begins and ends, and is no stay.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nla.cli import explain
from tests.helpers.tiny import make_pair
from tests.helpers.ways import Stay, way

MOST_STAYS = 8


def shown(stays: list[Stay]) -> str:
    """A way as a list, for the message of a failure."""
    return "\n".join(f"{stay.file}  <- {stay.handed_by}" for stay in stays)


def test_a_text_goes_once_through_each_file_of_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    monkeypatch.setattr(explain, "load", lambda *_: pair)
    stays = way(lambda: explain.explain("the cat sat on the mat", samples=2, json=True))
    files = [stay.file for stay in stays if not stay.file.startswith("nla/cli/")]
    assert files == [
        "nla/autoencoder.py",
        "nla/models/read.py",
        "nla/text/tokens.py",
        "nla/pair/encoder.py",
        "nla/models/generate.py",
        "nla/pair/decoder.py",
        "nla/pair/explanations.py",
        "nla/text/claims.py",
    ], shown(stays)
    assert len(files) <= MOST_STAYS and len(set(files)) == len(files)
    page = (Path(__file__).parents[1] / "docs" / "house.md").read_text("utf-8")
    listed = page.split("## The way of a text", 1)[1].split("##", 1)[0]
    assert sorted(files, key=listed.index) == files, "docs/house.md lists another way"


@pytest.mark.slow
def test_a_rollout_goes_once_through_each_file_of_joint_training(tmp_path: Path) -> None:
    from nla.train.fit.joint import marker_forbidden
    from tests.train.test_every_architecture import trainer_of

    pair = make_pair(scale=0.3)
    with trainer_of(pair, tmp_path) as trainer, marker_forbidden(trainer.model, pair.config.injection.marker_id):
        rows = [trainer.train_dataset[index] for index in (0, 0, 1, 1)]
        stays = way(lambda: trainer._generate_and_score_completions(rows))
    files = [stay.file for stay in stays]
    assert "nla/pair/decoder.py" in files and len(files) <= MOST_STAYS and len(set(files)) == len(files), shown(stays)


def test_a_return_is_no_stay_and_a_second_hand_over_is_one() -> None:
    from nla.text.claims import claims
    from nla.text.markdown import table

    text = "It is spring. Anna is here."
    returned = way(lambda: (claims(text), claims(text), table([text], [])))
    assert [stay.file for stay in returned] == ["nla/text/claims.py", "nla/text/markdown.py"]
    there_and_back = way(lambda: (claims(text), table([text], []), claims(text)))
    assert [stay.file for stay in there_and_back] == [
        "nla/text/claims.py",
        "nla/text/markdown.py",
        "nla/text/claims.py",
    ]
