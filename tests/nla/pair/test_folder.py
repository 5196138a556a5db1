"""A pair on disk: it comes back as it was, and anything broken is refused with a typed error."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from nla import NLA
from nla.config import NLAConfig
from nla.errors import ArgumentError, ConfigError, NonFiniteError, StorageError, TokenizerMismatchError, WeightsError
from nla.metrics import Baseline
from nla.pair import folder as pair_folder
from nla.storage import hashes, tensors
from tests.helpers.tiny import D_MODEL, TEXTS, make_config, make_model, make_pair, make_tokenizer

HEAD = "decoder/head.safetensors"
ENCODER = "encoder/adapter_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A folder that holds a target and a pair beside it."""
    root = tmp_path_factory.mktemp("models")
    make_model().save_pretrained(root / "planner")
    make_tokenizer().save_pretrained(root / "planner")
    pair = make_pair(scale=0.3, target=str(root / "planner"))
    pair.metrics = {"fve": 0.5}
    pair.save_pretrained(root / "pair")
    return root


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break; returns the pair's folder."""
    shutil.copytree(original, tmp_path / "models")
    return tmp_path / "models" / "pair"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another pair's folder, of the same shapes."""
    folder = tmp_path_factory.mktemp("other")
    pair = make_pair(seed=1, scale=0.3)
    for part, scale in (("encoder", 8), ("decoder", 8)):
        pair.model.peft_config["default" if part == "encoder" else part].lora_alpha = scale
    pair.head.bias.data += 1
    pair.baselines = {"global": Baseline.fit(torch.randn(20, D_MODEL))}
    pair.save_pretrained(folder)
    return folder


def vouch(folder: Path) -> None:
    """Make a pair's config vouch for what lies in its folder and in its target's now."""
    files, target = pair_folder.hash_files(folder), hashes.hash_weights(folder.parent / "planner")
    replace(NLAConfig.load(folder), files=files, target_weights=target).save(folder)


def load(folder: Path) -> NLA:
    return NLA.from_pretrained(folder, device="cpu")


def test_a_pair_comes_back_as_it_was_even_moved_with_its_target(saved: Path) -> None:
    pair, before = load(saved), make_pair(scale=0.3)
    assert json.loads((saved / "nla_config.json").read_text())["target"] == "../planner"
    acts = pair.read(TEXTS)
    assert torch.equal(acts.vectors, before.read(TEXTS).vectors)
    notes, expected = pair.explain(acts, seed=4), before.explain(acts, seed=4)
    assert notes.texts == expected.texts
    assert torch.equal(pair.reconstruct(notes), before.reconstruct(expected))
    assert pair.metrics == {"fve": 0.5}
    assert pair.baselines["global"].variance == pytest.approx(before.baselines["global"].variance)
    assert torch.equal(pair.baselines["global"].mean, before.baselines["global"].mean)
    assert not pair.model.training
    assert pair.n_parameters == before.n_parameters


def test_the_folder_is_the_documented_one_and_holds_no_path_of_this_machine(saved: Path) -> None:
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert files == {
        "nla_config.json",
        "metrics.json",
        "README.md",
        "baselines.safetensors",
        "encoder/adapter_config.json",
        ENCODER,
        "decoder/adapter_config.json",
        "decoder/adapter_model.safetensors",
        HEAD,
    }
    for name in files:
        assert str(saved.parent).encode() not in (saved / name).read_bytes()
        assert b"pytest" not in (saved / name).read_bytes()


def test_plain_peft_loads_the_adapters(saved: Path) -> None:
    ids, pair = torch.tensor([[11, 33, 37]]), load(saved)
    for part in ("encoder", "decoder"):
        plain = PeftModel.from_pretrained(make_model(), saved / part).eval()
        with torch.no_grad(), pair.role(part):
            assert torch.allclose(pair.model(ids).logits, plain(ids).logits, atol=1e-6)


def test_a_pair_saved_elsewhere_still_finds_its_target(saved: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path / "other" / "deep" / "copy")
    assert load(tmp_path / "other" / "deep" / "copy").read(TEXTS[0]).vectors.isfinite().all()


def test_adapters_may_be_saved_rounded_and_come_back_in_the_type_that_trains(saved: Path, tmp_path: Path) -> None:
    pair = load(saved)
    pair.save_pretrained(tmp_path / "models" / "half", adapter_dtype=torch.bfloat16)
    assert {weight.dtype for weight in load_file(tmp_path / "models" / "half" / ENCODER).values()} == {torch.bfloat16}
    assert (tmp_path / "models" / "half" / HEAD).read_bytes() == (saved / HEAD).read_bytes()
    half = load(tmp_path / "models" / "half")
    of_half = dict(half.model.named_parameters())
    adapters = {name: weight for name, weight in pair.model.named_parameters() if ".lora_" in name}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in adapters.values())
    for name, weight in adapters.items():
        assert of_half[name].dtype == torch.float32 and torch.equal(of_half[name], weight.bfloat16().float())
    with pytest.raises(ArgumentError, match="floating-point"):
        pair.save_pretrained(tmp_path / "other", adapter_dtype=torch.int8)
    assert not (tmp_path / "other").exists()


def test_saving_again_replaces_the_pair_and_keeps_other_files(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "README.md").write_text("my card")
    pair = load(saved)
    pair.head.bias.data += 1
    pair.save_pretrained(saved)
    assert torch.equal(load(saved).head.bias, pair.head.bias)
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "README.md").read_text() == "my card"
    assert not list(saved.parent.glob(".*"))


def test_a_full_disk_leaves_the_earlier_pair_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load(saved)
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    pair.head.bias.data += 1

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(StorageError, match="free space"):
        pair.save_pretrained(saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert not list(saved.parent.glob(".*"))


def test_weights_that_are_not_finite_are_not_saved(saved: Path) -> None:
    pair = load(saved)
    pair.head.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="weight"):
        pair.save_pretrained(saved)
    assert load(saved).head.weight.isfinite().all()


def test_each_header_is_read_once_in_a_load_and_anew_in_the_next(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    checked = tensors._checked

    def counted(content: Any, offset: int, size: int) -> tensors.Header:
        sizes.append(size)
        return checked(content, offset, size)

    monkeypatch.setattr(tensors, "_checked", counted)
    expected = sorted(file.stat().st_size for file in saved.parent.rglob("*.safetensors"))
    assert len(expected) == 5, "the target's, two adapters', the head's and the baselines'"
    for _ in range(2):
        sizes.clear()
        load(saved)
        assert sorted(sizes) == expected
    save_file({}, saved / HEAD)
    with pytest.raises(WeightsError, match=r"head\.safetensors"):
        load(saved)


def test_loading_does_not_disturb_the_global_random_state(saved: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    load(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", pair_folder.MANIFEST)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "empty", "of another pair"])
def test_a_damaged_or_exchanged_file_is_refused_by_name(saved: Path, other: Path, name: str, damage: str) -> None:
    path = saved / name
    data = path.read_bytes()
    path.unlink()
    if damage != "removed":
        flipped = data[:-5] + bytes([data[-5] ^ 0x10]) + data[-4:]
        changed = {"truncated": data[:-50], "flipped": flipped, "empty": b""}
        path.write_bytes(changed[damage] if damage in changed else (other / name).read_bytes())
    with pytest.raises((WeightsError, ConfigError), match=rf"{name}.*Next: restore"):
        load(saved)


def test_an_adapter_of_another_scale_is_refused(saved: Path) -> None:
    path = saved / "encoder/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    with pytest.raises(ConfigError, match=r"encoder/adapter_config\.json"):
        load(saved)


def test_figures_and_model_card_may_be_edited(saved: Path) -> None:
    (saved / "metrics.json").write_text('{"fve": 1}')
    (saved / "README.md").unlink()
    assert load(saved).metrics == {"fve": 1}


def test_a_pair_without_hashes_is_refused(saved: Path) -> None:
    replace(NLAConfig.load(saved), files={}).save(saved)
    with pytest.raises(ConfigError, match=r"no files.*Next: .*save or train the pair again"):
        load(saved)


def test_an_interrupted_save_never_leaves_a_mixture_that_loads(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after each of the moves in turn: what loads is wholly the old pair or wholly the new one."""
    backup, move, refused = shutil.copytree(saved, saved.parent / "backup"), os.replace, 0

    def state(pair: NLA) -> list[float]:
        adapters = [float(p.detach().sum()) for name, p in pair.model.named_parameters() if "lora_B" in name]
        return [*adapters, float(pair.head.bias.detach().sum())]

    pair = load(saved)
    old = state(pair)
    for name, parameter in [*pair.model.named_parameters(), *pair.head.named_parameters()]:
        parameter.data += 0.5 * ("lora_B" in name or name == "bias")
    for n_moves in range(len(pair_folder.MANIFEST) + 2):
        moved = []

        def interrupted(source, place, moved=moved, n_moves=n_moves) -> None:
            if Path(place).is_relative_to(saved):
                if len(moved) == n_moves:
                    raise KeyboardInterrupt
                moved.append(place)
            move(source, place)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", interrupted)
            pair.save_pretrained(saved)
        try:
            assert state(load(saved)) == old
        except (WeightsError, ConfigError):
            refused += 1
        shutil.rmtree(saved)
        shutil.copytree(backup, saved)
    assert refused >= 3, "a save of other weights passes through mixtures"
    pair.save_pretrained(saved)
    assert state(load(saved)) == state(pair) != old


@pytest.mark.parametrize("name", [HEAD, ENCODER])
def test_weights_of_other_names_shapes_or_not_finite_are_refused(saved: Path, name: str) -> None:
    path, tensors = saved / name, load_file(saved / name)
    first = next(iter(tensors))
    others = {
        "renamed": {("x" + key if key == first else key): value for key, value in tensors.items()},
        "cut": {key: value[:-1].clone() if key == first else value for key, value in tensors.items()},
    }
    for changed in others.values():
        save_file(changed, path)
        vouch(saved)
        with pytest.raises((WeightsError, ConfigError), match=r"exactly the|its rank in|the target's width"):
            load(saved)
    save_file({key: value * torch.nan if key == first else value for key, value in tensors.items()}, path)
    vouch(saved)
    with pytest.raises(NonFiniteError, match=path.name):
        load(saved)


def test_another_target_of_the_same_shape_is_refused(saved: Path) -> None:
    make_model(seed=1).save_pretrained(saved.parent / "planner")
    with pytest.raises(WeightsError, match=r"planner, whose weights.*Next: restore the target"):
        load(saved)


def test_a_target_with_another_config_is_refused(saved: Path) -> None:
    path = saved.parent / "planner" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'))
    with pytest.raises(WeightsError, match="planner"):
        load(saved)


def test_a_pair_saved_after_its_target_was_exchanged_still_names_the_one_it_was_trained_on(saved: Path) -> None:
    pair = load(saved)
    make_model(seed=1).save_pretrained(saved.parent / "planner")
    pair.save_pretrained(saved)
    with pytest.raises(WeightsError, match="planner"):
        load(saved)


def test_a_damaged_target_is_refused(saved: Path) -> None:
    path = saved.parent / "planner" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="truncated or corrupt"):
        load(saved)


def test_a_target_without_all_its_weights_is_refused_not_filled_at_random(saved: Path) -> None:
    path = saved.parent / "planner" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    vouch(saved)
    with pytest.raises(WeightsError, match="up_proj"):
        load(saved)


def test_a_target_that_is_not_finite_is_refused(saved: Path) -> None:
    path = saved.parent / "planner" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    vouch(saved)
    with pytest.raises(NonFiniteError, match="norm"):
        load(saved)


def test_a_target_of_another_width_is_refused(saved: Path, tmp_path: Path) -> None:
    config = make_model().config
    config.hidden_size = 64
    type(make_model())(config).save_pretrained(saved.parent / "planner")
    make_tokenizer().save_pretrained(saved.parent / "planner")
    vouch(saved)
    with pytest.raises(ConfigError, match="width 64"):
        load(saved)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva", False])
def test_an_adapters_own_start_does_not_touch_the_base(saved: Path, start: str | bool) -> None:
    path = saved / "encoder/adapter_config.json"
    path.write_text(path.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": {json.dumps(start)}'))
    vouch(saved)
    base = {name: value for name, value in load(saved).model.get_base_model().named_parameters() if "lora_" not in name}
    expected = dict(make_model().named_parameters())
    assert len(base) == len(expected)
    assert all(torch.equal(value, expected[name.replace(".base_layer", "")]) for name, value in base.items())


def test_the_end_tokens_are_those_of_training_or_of_an_older_pair_the_targets(saved: Path) -> None:
    (saved.parent / "planner" / "generation_config.json").write_text('{"eos_token_id": [2, 30, 31]}')
    assert load(saved).encoder.end_ids == [2] == NLAConfig.load(saved).end_ids
    replace(NLAConfig.load(saved), end_ids=None).save(saved)
    assert load(saved).encoder.end_ids == [2, 30, 31]


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"layer_replication": [[0, 4], [0, 4]]},
        {"trainable_token_indices": [3]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_adapter_that_reaches_beyond_its_matrices_is_refused(saved: Path, change: dict) -> None:
    path = saved / "decoder/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    vouch(saved)
    with pytest.raises(ConfigError, match=r"decoder.adapter_config\.json"):
        load(saved)


def test_another_tokenizer_is_refused(saved: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "")
    tokenizer.save_pretrained(saved.parent / "planner")
    with pytest.raises(TokenizerMismatchError, match="chat-template"):
        load(saved)


def test_an_edited_config_is_refused(saved: Path) -> None:
    path = saved / "nla_config.json"
    path.write_text(path.read_text().replace("resid_post.1", "resid_post.2"))
    with pytest.raises(ConfigError, match="edited"):
        load(saved)


def test_a_missing_target_pair_or_name_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.rmtree(saved.parent / "planner")
    with pytest.raises(ConfigError, match="no target"):
        load(saved)
    with pytest.raises(ConfigError, match=r"nla_config\.json"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="couplets"):
        NLA.from_pretrained("no-such-pair")


@pytest.mark.parametrize("target", ["../planner", "/etc", "./inside/../../planner", "inside/../../planner"])
def test_a_downloaded_pair_may_not_lead_out_of_its_folder(saved: Path, target: str) -> None:
    tokenizer = make_tokenizer()
    config: NLAConfig = make_config(tokenizer, make_model(), target=target)
    with pytest.raises(ConfigError, match="from the hub"):
        pair_folder.target_source(config, saved, from_hub=True)


def test_a_downloaded_pair_may_name_a_hub_id_or_a_folder_inside(saved: Path) -> None:
    tokenizer, model = make_tokenizer(), make_model()
    hub = make_config(tokenizer, model, target="someone/target")
    assert pair_folder.target_source(hub, saved, from_hub=True) == "someone/target"
    (saved / "target").mkdir()
    inside = make_config(tokenizer, model, target="./target")
    assert pair_folder.target_source(inside, saved, from_hub=True) == str((saved / "target").resolve())


def test_a_pinned_revision_is_asked_for_and_remote_code_never_by_default(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list = []

    def record(source: str, **kwargs):
        asked.append((source, kwargs["revision"], kwargs["trust_remote_code"]))
        raise WeightsError("offline", "a network", "connect")

    monkeypatch.setattr(pair_folder, "load_target", record)
    there = {"target": "someone/target", "target_revision": "abc123", "target_weights": None}
    replace(NLAConfig.load(saved), **there).save(saved)
    with pytest.raises(WeightsError, match="offline"):
        load(saved)
    assert asked == [("someone/target", "abc123", False)]
