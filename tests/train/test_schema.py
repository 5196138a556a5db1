"""Settings are checked when they are made, and every fault in a recipe is a typed error that says the next step."""

from __future__ import annotations

import pytest

from nla.errors import ArgumentError, RecipeError
from nla.train.fit.settings import JointSettings
from nla.train.recipe import load_recipe
from nla.train.schema import build, override


@pytest.mark.parametrize("value", ["[", "{a: ", "*x", "!!python/name:os.system", "1: [2", "&a [*a]", "\t", "\0"])
def test_a_value_that_is_no_yaml_is_a_typed_error_that_names_the_key(value: str) -> None:
    with pytest.raises(RecipeError, match=r"the override 'joint\.steps'.*not YAML"):
        load_recipe("couplets", [f"joint.steps={value}"])
    with pytest.raises(RecipeError, match="the override 'a'"):
        override({}, f"a={value}")


def test_an_unknown_key_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(RecipeError, match=r"with 'stepz'; expected among steps, .*write steps for 'stepz'"):
        load_recipe("couplets", ["joint.stepz=3"])
    with pytest.raises(RecipeError, match="remove or rename"):
        load_recipe("couplets", ["joint.xyz=3"])


@pytest.mark.parametrize("huge", ["x" * 1_000_000, [1] * 1_000_000, {"a": {"b": [0] * 100_000}}])
def test_a_message_does_not_repeat_a_huge_value(huge: object) -> None:
    for make in (
        lambda: JointSettings(steps=huge),  # type: ignore[arg-type]
        lambda: build(JointSettings, {"steps": huge}, "file"),
        lambda: build(JointSettings, {"stratum_weights": {"x": huge}}, "file"),
        lambda: build(JointSettings, [huge], "file"),
        lambda: build(JointSettings, {str(huge): 1}, "file"),
    ):
        with pytest.raises((ArgumentError, RecipeError)) as caught:
            make()
        assert len(str(caught.value)) < 1000
        assert caught.value.__context__ is None or len(str(caught.value.__context__)) < 1000


def test_a_value_of_the_wrong_kind_is_named_with_what_was_expected() -> None:
    for values, says in (
        ({"steps": 2.5}, r"joint\.steps = 2\.5; expected a whole number"),
        ({"steps": True}, r"joint\.steps = True; expected a whole number"),
        ({"steps": 0}, r"joint\.steps = 0; expected at least 1"),
        ({"temperature": 0}, r"joint\.temperature = 0; expected above 0"),
        ({"beta": "nan"}, r"joint\.beta = .*; expected a finite number"),
        ({"reward": "best"}, r"joint\.reward = 'best'; expected one of neg_log_mse, neg_mse"),
        ({"stratum_weights": {"x": "y"}}, r"joint\.stratum_weights\.x = 'y'; expected a finite number"),
        ({"gradient_checkpointing": 1}, r"joint\.gradient_checkpointing = 1; expected true or false"),
        ({"rows_per_backward": 5}, "a divisor of"),
    ):
        with pytest.raises(ArgumentError, match=says):
            JointSettings(**values)  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match=f"file: {says}" if says[0] == "j" else says):
            build(JointSettings, values, "file")
    assert JointSettings(steps=3) == build(JointSettings, {"steps": 3}, "x") == JointSettings(3)
    with pytest.raises(AttributeError):
        JointSettings().steps = 3  # type: ignore[misc]
