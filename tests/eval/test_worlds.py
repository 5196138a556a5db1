"""Families of items refuse pairs and targets whose language they are not in, before anything is measured."""

from __future__ import annotations

import re

import pytest

from nla import NLA
from nla.errors import ArgumentError
from nla.eval.families.gates import GateSettings, evaluate_gates
from nla.eval.families.rhymes import RhymeSettings, evaluate_rhymes
from nla.eval.worlds import require_world, world_of
from nla.organisms.couplets import tokenizer as couplets
from nla.organisms.switchboard import tokenizer as switchboard
from tests.helpers.shell import Shell
from tests.helpers.tiny import make_model, make_pair, make_tokenizer


def test_a_world_is_known_by_its_tokenizer(tokenizer) -> None:
    assert world_of(couplets.build()) == "couplets" and world_of(switchboard.build()) == "switchboard"
    assert world_of(tokenizer) is None
    require_world(couplets.build(), ["couplets"], "mine", "nla eval rhymes")


def test_a_refusal_says_what_it_is_what_was_wanted_and_what_to_do(tokenizer) -> None:
    with pytest.raises(ArgumentError, match=r"mine.*world switchboard.*world couplets.*nla eval two-hop"):
        require_world(switchboard.build(), ["couplets"], "mine", "nla eval rhymes")
    with pytest.raises(ArgumentError, match=r"no embedded world.*nla eval fidelity PAIR --texts FILE"):
        require_world(tokenizer, ["couplets"], "mine", "nla eval rhymes")


def test_the_rhyme_protocol_and_the_gates_refuse_a_pair_of_no_world(pair: NLA) -> None:
    with pytest.raises(ArgumentError, match="nla eval rhymes"):
        evaluate_rhymes(pair, RhymeSettings(n_items=4))
    with pytest.raises(ArgumentError, match="nla eval gates"):
        evaluate_gates(pair, GateSettings(n_documents=4))


@pytest.mark.parametrize(
    "command",
    [
        "nla eval rhymes switchboard",
        "nla eval gates switchboard",
        "nla eval two-hop couplets",
        "nla eval plants couplets",
        "nla eval auditing couplets",
        "nla eval readers couplets --contrast switchboard",
    ],
)
def test_a_family_command_on_another_worlds_model_says_so(shell: Shell, command: str, tmp_path) -> None:
    done = shell.run(command, tmp_path)
    world = "switchboard" if command.endswith("couplets") else "couplets"
    assert done.code == 2 and not done.stdout
    assert f"expected one of the world {world}" in done.stderr and "Next: run `nla eval" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["rhymes", "gates", "two-hop", "plants", "auditing", "readers"])
def test_a_family_command_on_a_pair_of_no_world_names_the_worlds_it_knows(shell: Shell, command: str, tmp_path) -> None:
    make_model().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_pair(target=str(tmp_path / "target")).save_pretrained(tmp_path / "pair")
    done = shell.run(f"nla eval {command} pair", tmp_path)
    assert done.code == 2 and not done.stdout and "Traceback" not in done.stderr
    assert re.search(r"of no embedded world; expected one of the world (couplets|switchboard)", done.stderr), (
        done.stderr
    )
    assert "nla eval fidelity PAIR --texts FILE" in done.stderr


@pytest.mark.parametrize(
    "command", ["nla eval fidelity switchboard", "nla eval two-hop switchboard", "nla eval rhymes couplets"]
)
def test_a_warm_start_on_another_target_is_refused_even_where_it_is_as_wide(
    shell: Shell, command: str, tmp_path
) -> None:
    other = "couplets" if command.endswith("switchboard") else "switchboard"
    done = shell.run(f"{command} --warm-start {other} --items 4", tmp_path)
    assert done.code == 2 and not done.stdout and "Traceback" not in done.stderr
    assert (
        "whose weights differ" in done.stderr and "Next: give pairs that were trained on the same target" in done.stderr
    )
