"""Targets as the suite opens them: by any name, from safe and finite weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from nla.baselines import fit_baselines
from nla.errors import NonFiniteError, PointError, ShapeError, TargetError
from nla.eval.circuits.patching import read_sites
from nla.eval.readers.labelled_texts import class_words
from nla.eval.target import Patch, Shift, Target, continued, last_token, open_target, read_last, token_ids, write
from nla.models.points import Point
from nla.organisms import (
    ADAPTERS,
    PACKAGED,
    PAIRS,
    TARGETS,
    adapter_folder,
    couplets,
    pair_folder,
    switchboard,
    target_folder,
)
from nla.stats import derangement
from tests.helpers.targets import POINT, files_of, saved
from tests.helpers.tiny import TEXTS, make_model, make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "target")


def test_a_folder_of_pickles_alone_is_refused(folder: Path) -> None:
    weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    for load in (Target.load, open_target):
        with pytest.raises(TargetError, match="without safetensors"):
            load(folder, POINT, device="cpu")


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    path = folder / files_of(folder)[name]
    weights = load_file(path)
    weights[name][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    for load in (Target.load, open_target):
        with pytest.raises(NonFiniteError, match="up_proj"):
            load(folder, POINT, device="cpu")


def test_a_point_that_the_model_has_not_is_refused_before_weights_are_read(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"not safetensors")
    with pytest.raises(PointError):
        Target.load(folder, "resid_post.4", device="cpu")


def test_the_type_of_the_weights_and_the_adapter_are_those_asked_for() -> None:
    plain = Target.load("switchboard", "resid_post.3", device="cpu", dtype="bfloat16")
    assert plain.model.dtype == torch.bfloat16
    plain, planted = (
        Target.load("switchboard", "resid_post.3", device="cpu", adapter=a) for a in (None, next(iter(ADAPTERS)))
    )
    changed = {n for n, p in planted.model.named_parameters() if not torch.equal(p, plain.model.get_parameter(n))}
    assert changed and all("layers" in name for name in changed)


def test_a_tokenizer_that_adds_bos_gives_every_path_the_same_tokens() -> None:
    """Reading, site reading, patching and writing count columns from the same first token."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|user|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", tokenizer.convert_tokens_to_ids("<|user|>"))]
    )
    target = Target(make_model(), tokenizer, Point.parse(POINT))
    prompts = [text.strip() for text in TEXTS]
    expected, columns = read_last(target, prompts), last_token(target, prompts)
    assert all(ids[0] == tokenizer.bos_token_id for ids in token_ids(target, prompts))
    sites = read_sites(target, token_ids(target, prompts), [POINT], columns[:, None])[:, 0, 0]
    assert torch.allclose(sites, expected, atol=1e-5)
    moved = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read_last(target, prompts, patches=[Patch(POINT, columns, moved)]), moved)
    assert write(target, prompts, [Patch(POINT, columns, expected)]) == write(target, prompts)
    assert write(target, prompts) == [alone for prompt in prompts for alone in write(target, [prompt])]


@pytest.mark.parametrize("together", [True, False])
def test_a_shift_moves_its_token_and_all_after_it_written_ones_too(together: bool) -> None:
    """As whole passes without a cache do, in which a hook of the test's own adds to every column from there on."""
    target, strength = Target(make_model(), make_tokenizer(), Point.parse(POINT)), 0.8
    ids = token_ids(target, TEXTS)
    columns = torch.tensor([2, len(ids[1]) - 1, 0, 5])
    directions = 9 * torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(1))
    if together:
        found = continued(target, ids, 6, patches=[Shift(POINT, columns, directions, strength)]).rows()
    else:
        parts = [Shift(POINT, columns, directions, strength).rows(torch.tensor([row])) for row in range(len(ids))]
        found = [continued(target, [row], 6, patches=[part]).rows()[0] for row, part in zip(ids, parts, strict=True)]

    def by_hand(row: int) -> list[int]:
        def moved(_module, _given, out):
            step = strength * out.norm(dim=-1, keepdim=True) * directions[row] / directions[row].norm()
            return torch.cat([out[:, : columns[row]], (out + step)[:, columns[row] :]], dim=1)

        tokens = list(ids[row])
        handle = target.model.model.layers[Point.parse(POINT).layer].register_forward_hook(moved)
        with torch.no_grad():
            while len(tokens) < len(ids[row]) + 6:
                token = int(target.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
                if token == target.tokenizer.eos_token_id:
                    break
                tokens.append(token)
        handle.remove()
        return tokens[len(ids[row]) :]

    assert found == [by_hand(row) for row in range(len(ids))] != continued(target, ids, 6).rows()


@pytest.mark.parametrize(
    ("name", "target", "pair"),
    [
        ("couplets", couplets.PLANNER, couplets.PAIR),
        ("couplets/planner", couplets.PLANNER, couplets.PAIR),
        ("switchboard", switchboard.TARGET, switchboard.PAIR),
        ("switchboard/target", switchboard.TARGET, switchboard.PAIR),
        ("someone/model", None, None),
    ],
)
def test_an_embedded_name_means_one_target_and_one_pair_everywhere(name, target, pair) -> None:
    assert target_folder(name) == str(target or name)
    assert pair_folder(name) == str(pair or name)


def test_a_name_that_is_not_embedded_is_left_as_it_is(tmp_path: Path) -> None:
    assert target_folder(tmp_path) == pair_folder(tmp_path) == adapter_folder(tmp_path) == str(tmp_path)
    assert adapter_folder(None) is None and adapter_folder("switchboard/goal") == str(ADAPTERS["switchboard/goal"])
    assert set(PAIRS) <= {*TARGETS, *PACKAGED} and set(PAIRS) >= {*PACKAGED}


@pytest.mark.parametrize("name", ["switchboard", str(switchboard.PAIR), str(switchboard.TARGET)])
def test_a_target_opens_from_its_name_its_pair_and_its_folder(name: str) -> None:
    expected = Target.load("switchboard/target", "resid_post.3", device="cpu")
    opened = open_target(name, "resid_post.3", device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    with opened.active(), torch.no_grad():
        assert torch.equal(opened.model(ids).logits, expected.model(ids).logits)
    assert opened.point == expected.point


def test_a_bare_string_is_one_prompt_one_stratum_and_one_word_everywhere() -> None:
    target, text = Target(make_model(), make_tokenizer(), Point.parse(POINT)), TEXTS[0].strip()
    assert token_ids(target, text) == token_ids(target, [text])
    assert torch.equal(last_token(target, text), last_token(target, [text]))
    assert torch.equal(read_last(target, text), read_last(target, [text]))
    patch = Patch(POINT, last_token(target, text), torch.randn(1, 32))
    assert torch.equal(read_last(target, text, patches=[patch]), patch.vectors)
    assert write(target, text) == write(target, [text])
    assert class_words(["winter", "spring"], "winter=snow,ice")["winter"] == ("snow", "ice")
    for refused in (lambda: fit_baselines(torch.randn(5, 4), "all12"), lambda: derangement(5, 0, "aabbc")):
        with pytest.raises(ShapeError, match="one name a vector"):
            refused()
