"""EasyNLA's LoRA pairs become native pairs: same adapters, same norm, same decoder, or a typed refusal."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import parity_pairs as pairs  # type: ignore[import-not-found]

from nla import NLA
from nla.errors import ArgumentError, ConfigError, MissingExtraError, SidecarError, TokenizerMismatchError, WeightsError
from nla.formats import easynla
from nla.models.hooks import inject

TEXT = "the cat sat on the mat."


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    pairs.lora_pair(root, "llama")
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy of a target, an AV adapter and an AR in it that a test may break."""
    return shutil.copytree(original, tmp_path / "models")


def load(root: Path, **options) -> NLA:
    return easynla.load(root / "av", target=root / "target", dtype="float32", device="cpu", **options)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_config_says_how_theirs_differ(root: Path) -> None:
    config = load(root).config
    assert (config.injection.mode, config.injection.layer, config.injection.norm) == ("add", 1, None)
    assert (config.decoder.final_norm, config.decoder.head_bias, config.decoder.special_tokens) == (False, False, False)
    assert (config.point, config.quantization) == ("resid_post.1", None)
    edit(root / "av" / "critic" / "ar_meta.json", final_norm_stripped=False)
    assert load(root).config.decoder.final_norm


def test_the_adapters_scale_is_that_of_rslora(root: Path) -> None:
    """alpha / √r, where plain LoRA has alpha / r: the decoder's stream from merged weights, by hand."""
    nla = load(root)
    tensors = load_file(root / "av" / "critic" / "ar_lora_value_head.safetensors")
    cut = pairs.make_model("llama", 0)
    for name, module in cut.named_modules():
        first = tensors.get(f"backbone.{name}.lora_A.default.weight")
        if first is not None:
            module.weight.data += 8 / 4**0.5 * tensors[f"backbone.{name}.lora_B.default.weight"] @ first
    with torch.no_grad(), nla.role("decoder"):
        batch = nla.encode_explanations([TEXT])
        stream = cut(batch.input_ids, output_hidden_states=True).hidden_states[pairs.LAYER + 1][:, -1]
        assert torch.allclose(nla.decode_ids(*batch), stream @ tensors["value_head.weight"].T, atol=1e-4)
        assert int(batch.input_ids[0, 0]) != nla.tokenizer.bos_token_id


def test_scaling_the_stream_before_a_linear_head_leaves_the_direction(root: Path) -> None:
    nla = load(root)
    stream = torch.randn(5, pairs.D_MODEL)
    with torch.no_grad():
        found = torch.cosine_similarity(nla.head(stream), nla.head(stream / stream.norm(dim=1, keepdim=True) * 5.7))
    assert torch.allclose(found, torch.ones(5), atol=1e-6)


def test_it_goes_to_one_place_and_a_tilde_is_a_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="one base"):
        easynla.load(root / "av", target=root / "target", device={"encoder": "cpu"})
    monkeypatch.setenv("HOME", str(root))
    nla = easynla.load("~/av", "~/av/critic", "~/target", sidecar="~/av", dtype="float32", device="cpu")
    assert nla.target_folder == (root / "target").resolve()


def test_an_imported_pair_is_a_native_one(root: Path) -> None:
    nla = load(root)
    nla.save_pretrained(root / "pair")
    again = NLA.from_pretrained(root / "pair", device="cpu")
    acts = again.read(TEXT)
    notes = again.explain(acts, samples=2, max_new_tokens=6)
    assert notes.texts == nla.explain(acts, samples=2, max_new_tokens=6).texts
    assert torch.equal(again.reconstruct(notes), nla.reconstruct(notes))
    assert again.n_parameters == nla.n_parameters
    again.require_adapters("joint training")
    blocks = {
        int(name.split(".layers.")[1].split(".")[0])
        for name, _ in again.model.named_parameters()
        if ".decoder." in name
    }
    assert blocks == {0, 1}


def test_the_direction_of_an_activation_enters_and_its_length_does_not(root: Path) -> None:
    nla = load(root)

    def asked(vectors: torch.Tensor) -> torch.Tensor:
        """Logits that :func:`nla.encoder.generate` samples the first token from."""
        seen: list[torch.Tensor] = []
        hook = nla.base_of("encoder").lm_head.register_forward_hook(lambda *args: seen.append(args[2]))
        nla.explain(vectors, greedy=True, max_new_tokens=1)
        hook.remove()
        return seen[-1][:, -1]  # before it, the prompt up to the marker is read once

    one, two = pairs.probe_vectors(2)[:, None]
    assert not torch.allclose(asked(one), asked(two), atol=1e-3)
    assert torch.allclose(asked(one), asked(100 * one), atol=1e-5)
    base, where = nla.base_of("encoder"), torch.tensor([nla.marker_position])
    with torch.no_grad(), nla.role("encoder"), inject(base, one, where, layer=1):
        expected = base(nla.prompt_ids).logits[:, -1]
    assert torch.allclose(asked(one), expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"ar_num_layers": 3}, "after block 1, and an AR of 3 blocks"),
        ({"ar_num_layers": None}, "ar_num_layers"),
        ({"lora_r": 0}, "lora_r"),
        ({"quant": "2bit"}, "quant"),
    ],
)
def test_a_description_of_other_weights_is_refused(root: Path, changes: dict, named: str) -> None:
    edit(root / "av" / "critic" / "ar_meta.json", **changes)
    with pytest.raises(SidecarError, match=named):
        load(root)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantised_weights_stay_quantised(root: Path) -> None:
    edit(root / "av" / "critic" / "ar_meta.json", quant="4bit")
    with pytest.raises(MissingExtraError, match="bitsandbytes"):
        load(root)


def test_weights_that_do_not_fit_are_refused(root: Path) -> None:
    path = root / "av" / "critic" / "ar_lora_value_head.safetensors"
    tensors = load_file(path)
    some = next(name for name in tensors if "lora_A" in name)
    changes = {
        r"value_head\.weight of None": {k: v for k, v in tensors.items() if k != "value_head.weight"},
        r"value_head\.weight of \(4, 4\)": tensors | {"value_head.weight": torch.eye(4)},
        "names missing": {k: v for k, v in tensors.items() if k != some},
        "LoRA of blocks 0 to 1": tensors
        | {"backbone.model.layers.2.mlp.up_proj.lora_A.default.weight": torch.ones(4, 32)},
        "its rank in": tensors | {some: tensors[some][:2].contiguous()},
    }
    for named, changed in changes.items():
        save_file(changed, path)
        with pytest.raises((WeightsError, ConfigError), match=named):
            load(root)
    path.unlink()
    with pytest.raises(WeightsError, match="no readable"):
        load(root)


def test_missing_parts_are_named(root: Path) -> None:
    sidecar = root / "av" / "nla_meta.yaml"
    elsewhere = sidecar.rename(root / "rl.parquet.nla_meta.yaml")
    with pytest.raises(SidecarError, match=r"give --sidecar FILE"):
        load(root)
    assert load(root, sidecar=elsewhere).config.point == "resid_post.1"
    (root / "av" / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="adapter_model"):
        load(root, sidecar=elsewhere)


def test_an_adapter_on_other_weights_than_were_read_is_refused(root: Path) -> None:
    config = root / "av" / "adapter_config.json"
    edit(config, base_model_name_or_path=str(root / "merged"))
    with pytest.raises(SidecarError, match=r"merged.*activations of .*target.*give --target"):
        easynla.load(root / "av", dtype="float32")
    meta = yaml.safe_load((root / "av" / "nla_meta.yaml").read_text())
    meta["extraction"]["base_model"] = str(root / "target")
    pairs.write_sidecar(root / "av", meta)
    edit(config, base_model_name_or_path=str(root / "target"))
    assert easynla.load(root / "av", dtype="float32", device="cpu").target_folder == (root / "target").resolve()
    load(root)


def test_a_base_of_another_width_or_tokenizer_is_refused(root: Path) -> None:
    path = root / "av" / "nla_meta.yaml"
    meta = yaml.safe_load(path.read_text())
    meta["extraction"]["d_model"] = 64
    pairs.write_sidecar(root / "av", meta)
    with pytest.raises((ConfigError, WeightsError), match="64"):
        load(root)
    meta["extraction"]["d_model"], meta["tokens"]["injection_token_id"] = pairs.D_MODEL, 9
    pairs.write_sidecar(root / "av", meta)
    with pytest.raises(TokenizerMismatchError, match="marker"):
        load(root)
