"""Files are written whole or not at all, and what is not whole is refused."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from nla.errors import ConfigError, NonFiniteError, StorageError, WeightsError
from nla.models import lora as adapter_module
from nla.storage import files as native
from nla.storage import hashes
from nla.storage import tensors as tensors_module
from tests.helpers.disk import limited_file_size


@pytest.fixture
def tensors():
    return {"a": torch.randn(5, 3), "b": torch.arange(4), "half": torch.randn(7).bfloat16()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("data, stored", [("grün\n", "grün\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_text_and_bytes_are_written_and_parents_made(tmp_path, data, stored):
    native.write_atomic(tmp_path / "new" / "file", data)
    assert (tmp_path / "new" / "file").read_bytes() == stored
    assert names(tmp_path / "new") == ["file"]


def test_a_write_that_fails_half_way_keeps_the_old_text(tmp_path):
    file = tmp_path / "file"
    native.write_atomic(file, "old")
    with limited_file_size(), pytest.raises(StorageError, match="free space"):
        native.write_atomic(file, b"x" * 100_000)
    assert file.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_write_that_fails_half_way_keeps_the_old_tensors(tmp_path, tensors):
    file = tmp_path / "t.safetensors"
    tensors_module.save_tensors(file, tensors)
    with limited_file_size(), pytest.raises(StorageError, match="free space"):
        tensors_module.save_tensors(file, {"a": torch.zeros(100_000)})
    assert tensors_module.load_tensors(file)["a"].equal(tensors["a"]) and names(tmp_path) == ["t.safetensors"]


def test_an_interrupt_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    file = tmp_path / "file"
    native.write_atomic(file, "old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(native.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        native.write_atomic(file, "new")
    assert file.read_text() == "old" and names(tmp_path) == ["file"]


def test_tensors_come_back_bit_identical(tmp_path, tensors):
    tensors_module.save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = tensors_module.load_tensors(tmp_path / "t.safetensors", expected_keys=tensors)
    assert all(loaded[k].dtype == v.dtype and loaded[k].equal(v) for k, v in tensors.items())


def test_equal_tensors_give_equal_bytes(tmp_path, tensors):
    for number in range(16):
        tensors_module.save_tensors(tmp_path / str(number), dict(reversed(tensors.items())) if number % 2 else tensors)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(16)}) == 1


def test_a_file_with_other_metadata_beside_the_checksum_is_read_and_checked(tmp_path, tensors):
    tensors_module.save_tensors(tmp_path / "new", tensors)
    with safe_open(tmp_path / "new", framework="pt") as file:
        save_file(tensors, tmp_path / "old", metadata={"format": "pt", **file.metadata()})
        save_file({**tensors, "a": tensors["a"] + 1}, tmp_path / "bad", metadata={"format": "pt", **file.metadata()})
    assert tensors_module.load_tensors(tmp_path / "old")["a"].equal(tensors["a"])
    with pytest.raises(WeightsError, match="checksum"):
        tensors_module.load_tensors(tmp_path / "bad")


def test_plain_safetensors_reads_ours_and_we_read_plain_ones(tmp_path, tensors):
    tensors_module.save_tensors(tmp_path / "ours.safetensors", tensors)
    assert load_file(tmp_path / "ours.safetensors")["a"].equal(tensors["a"])
    save_file(tensors, tmp_path / "plain.safetensors")
    assert tensors_module.load_tensors(tmp_path / "plain.safetensors")["b"].equal(tensors["b"])


def test_views_shared_empty_and_trained_tensors_are_stored_as_their_own(tmp_path):
    whole = torch.randn(6, 4, requires_grad=True)
    given = {"whole": whole, "same": whole, "rows": whole[2:4], "turned": whole.T, "none": torch.zeros(0, 3)}
    tensors_module.save_tensors(tmp_path / "t.safetensors", given)
    loaded = tensors_module.load_tensors(tmp_path / "t.safetensors")
    assert all(loaded[name].equal(value.detach()) for name, value in given.items())
    assert (tmp_path / "t.safetensors").stat().st_size < 2000


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, tensors, keep):
    file = tmp_path / "t.safetensors"
    tensors_module.save_tensors(file, tensors)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"truncated or corrupt.*Next: restore"):
        tensors_module.load_tensors(file)


def test_a_header_as_long_as_the_library_reads_is_read(tmp_path):
    file = tmp_path / "t.safetensors"
    save_file({"a": torch.arange(3)}, file, metadata={"note": "x" * 10**7})
    assert tensors_module.load_tensors(file)["a"].tolist() == [0, 1, 2]


def test_a_header_of_more_tensors_than_any_file_has_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"x{number}": entry for number in range(tensors_module.MAX_TENSORS + 1)}).encode()
    (tmp_path / "t.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    monkeypatch.setattr(tensors_module, "parse_json", lambda _: pytest.fail("parsed"))
    with pytest.raises(WeightsError, match="more than 95,000 tensors"):
        tensors_module.read_header(tmp_path / "t.safetensors")


@pytest.mark.slow
def test_an_adapter_of_every_expert_of_a_large_model_is_read(tmp_path):
    names = [f"layers.{block}.experts.{expert}.lora_A" for block in range(58) for expert in range(1536)]
    save_file({name: torch.zeros(1, dtype=torch.uint8) for name in names}, tmp_path / "t.safetensors")
    assert set(tensors_module.read_header(tmp_path / "t.safetensors").tensors) == set(names)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "complex64"])
def test_the_header_of_every_type_that_torch_saves_is_read(tmp_path, kind):
    save_file({"a": torch.zeros(3).to(getattr(torch, kind))}, tmp_path / "t.safetensors")
    assert tensors_module.read_header(tmp_path / "t.safetensors").tensors["a"].shape == (3,)


def test_one_flipped_bit_is_refused(tmp_path, tensors):
    file = tmp_path / "t.safetensors"
    tensors_module.save_tensors(file, tensors)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="checksum"):
        tensors_module.load_tensors(file)


def test_bytes_that_are_no_safetensors_a_folder_and_nothing_are_refused(tmp_path):
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "folder").mkdir()
    for name in ("noise", "folder", "nothing"):
        with pytest.raises(WeightsError, match=name):
            tensors_module.load_tensors(tmp_path / name)


@pytest.mark.parametrize("expected, named", [(["a", "b"], "half"), (["a", "b", "half", "c"], "'c'")])
def test_other_names_than_expected_are_refused(tmp_path, tensors, expected, named):
    tensors_module.save_tensors(tmp_path / "t.safetensors", tensors)
    with pytest.raises(WeightsError, match=named):
        tensors_module.load_tensors(tmp_path / "t.safetensors", expected_keys=expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, bad):
    values = {"weight": torch.tensor([1.0, bad])}
    with pytest.raises(NonFiniteError, match="weight"):
        tensors_module.save_tensors(tmp_path / "t.safetensors", values)
    assert names(tmp_path) == []
    save_file(values, tmp_path / "t.safetensors")
    with pytest.raises(NonFiniteError, match="weight"):
        tensors_module.load_tensors(tmp_path / "t.safetensors")


def make_base():
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=20, num_hidden_layers=2, **shape)).eval()


def make_peft(rank=2, adapter="decoder"):
    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], layers_to_transform=[0], init_lora_weights=False)
    return get_peft_model(make_base(), config, adapter_name=adapter)


@torch.no_grad()
def logits(model):
    return model(torch.arange(6)[None]).logits


def test_plain_peft_loads_an_adapter_folder(tmp_path):
    model = make_peft()
    adapter_module.save_adapter(tmp_path, model, "decoder")
    assert names(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]
    plain = PeftModel.from_pretrained(make_base(), str(tmp_path))
    assert logits(plain).equal(logits(model))
    assert not logits(plain).equal(logits(make_base()))


def test_an_adapter_loads_under_another_name(tmp_path):
    model = make_peft()
    adapter_module.save_adapter(tmp_path, model, "decoder")
    base = make_base()
    torch.manual_seed(1)
    other = get_peft_model(base, adapter_module.read_adapter_config(tmp_path), adapter_name="default")
    assert not logits(other).equal(logits(model))
    adapter_module.load_adapter(tmp_path, other, "default")
    assert logits(other).equal(logits(model))


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    adapter_module.save_adapter(tmp_path, make_peft(rank=2), "decoder")
    with pytest.raises(WeightsError, match="the shape in this model"):
        adapter_module.load_adapter(tmp_path, make_peft(rank=4), "decoder")


def test_an_adapter_configuration_that_is_missing_or_of_no_known_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adapter_config"):
        adapter_module.read_adapter_config(tmp_path)
    native.write_json(tmp_path / "adapter_config.json", {"peft_type": "NO_SUCH_KIND"})
    with pytest.raises(ConfigError, match="adapter_config"):
        adapter_module.read_adapter_config(tmp_path)


@torch.no_grad()
def test_a_pattern_that_gives_every_module_a_lower_rank_is_legal(tmp_path):
    config = LoraConfig(r=16, rank_pattern={"q_proj": 4, "v_proj": 2}, target_modules=["q_proj", "v_proj"])
    config.init_lora_weights = False
    model = get_peft_model(make_base(), config, adapter_name="decoder")
    adapter_module.save_adapter(tmp_path, model, "decoder")
    other = get_peft_model(make_base(), adapter_module.read_adapter_config(tmp_path), adapter_name="default")
    adapter_module.load_adapter(tmp_path, other, "default")
    assert logits(other).equal(logits(model))


@pytest.mark.parametrize("changes", [{"r": 10**9}, {"rank_pattern": {"layers.0.self_attn.q_proj": 10**9}}])
def test_a_rank_above_that_of_the_weights_is_refused_before_matrices_are_made(tmp_path, changes):
    adapter_module.save_adapter(tmp_path, make_peft(), "decoder")
    path = tmp_path / "adapter_config.json"
    native.write_json(path, {**native.read_json(path), **changes})
    with pytest.raises(ConfigError, match=r"of rank 1000000000 for .*at most 2"):
        adapter_module.read_adapter_config(tmp_path)


def test_ranks_of_modules_without_weights_are_no_higher_than_those_of_the_others(tmp_path):
    adapter_module.save_adapter(tmp_path, make_peft(), "decoder")
    path = tmp_path / "adapter_config.json"
    patterns = {"q_proj": 2, "v_proj": 2, "mlp.up_proj": 10**9}
    native.write_json(path, {**native.read_json(path), "r": 10**9, "rank_pattern": patterns})
    config = adapter_module.read_adapter_config(tmp_path)
    assert config.r == 2 and set(config.rank_pattern.values()) == {2}


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_an_adapter_that_was_trained_on_a_changed_base_is_refused(tmp_path, start):
    adapter_module.save_adapter(tmp_path, make_peft(), "decoder")
    path = tmp_path / "adapter_config.json"
    native.write_json(path, {**native.read_json(path), "init_lora_weights": start})
    with pytest.raises(ConfigError, match=r"convert it first.*path_initial_model") as caught:
        adapter_module.read_adapter_config(tmp_path)
    assert "pair" not in str(caught.value)


def write_weights(path: Path, value: int) -> None:
    """A file of one tensor, of the same size whatever its value."""
    save_file({"a": torch.tensor([value])}, path)


def test_of_a_models_folder_the_weights_that_load_are_hashed_and_no_others(tmp_path):
    write_weights(tmp_path / "model.safetensors", 0)
    for name in ("config.json", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    found = hashes.hash_weights(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"a copy in another layout")
    assert hashes.hash_weights(tmp_path) == found
    write_weights(tmp_path / "model.safetensors", 1)
    assert hashes.hash_weights(tmp_path) != found
    native.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "m1.safetensors"}})
    with pytest.raises(WeightsError, match="m1"):
        hashes.hash_weights(tmp_path)
    write_weights(tmp_path / "m1.safetensors", 1)
    indexed = hashes.hash_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"unused now")
    assert hashes.hash_weights(tmp_path) == indexed
    files = [(name, hashlib.sha256((tmp_path / name).read_bytes())) for name in ("config.json", "m1.safetensors")]
    listing = "\n".join(f"{digest.hexdigest()} {name}" for name, digest in files)
    assert indexed == hashlib.sha256(listing.encode()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Notes of hashes of every file, and the list of files that were hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_REMEMBERED_BYTES", 1)
    hashed, original = [], hashes.sha256

    def counted(path):
        hashed.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(hashes, "sha256", counted)
    (tmp_path / "model").mkdir()
    write_weights(tmp_path / "model" / "model.safetensors", 1)
    return tmp_path / "cache" / "nla" / "sha256.json", hashed


def test_a_large_file_is_hashed_once_and_again_when_it_changed(tmp_path, cache):
    notes, hashed = cache
    weights = tmp_path / "model" / "model.safetensors"
    first = hashes.hash_weights(tmp_path / "model")
    assert hashes.hash_weights(tmp_path / "model") == first and hashed == ["model.safetensors"] and notes.is_file()
    times = weights.stat()
    write_weights(weights, 2)  # as long, and then as old
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hashes.hash_weights(tmp_path / "model") != first and len(hashed) == 2


@pytest.mark.parametrize("damage", ["", "[1]", '{"x": 3}', "not json"])
def test_damaged_notes_of_hashes_are_no_error(tmp_path, cache, damage):
    notes, hashed = cache
    first = hashes.hash_weights(tmp_path / "model")
    notes.write_text(damage)
    assert hashes.hash_weights(tmp_path / "model") == first and len(hashed) == 2
    assert hashes.hash_weights(tmp_path / "model") == first and len(hashed) == 2


def test_without_a_place_for_notes_files_are_hashed_each_time(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hashes.hash_weights(tmp_path / "model") == hashes.hash_weights(tmp_path / "model") and len(cache[1]) == 2


def test_a_file_nested_beyond_what_python_reads_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not JSON"):
        native.read_json(tmp_path / "deep.json")


@pytest.mark.parametrize("name", ["", ".", "folder"])
def test_a_folder_where_a_file_is_to_be_written_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="path of a file"):
        native.write_atomic(tmp_path / name, "x")


def test_among_many_keys_one_that_stands_twice_is_named_at_once():
    keys = [f'"{number}": 0' for number in range(60_000)]
    started = time.thread_time()
    with pytest.raises(ValueError, match="the key '59999' twice"):
        native.parse_json("{" + ", ".join([*keys, keys[-1]]) + "}")
    assert time.thread_time() - started < 2


def test_lines_of_json_end_in_a_line_feed_alone(tmp_path):
    ends = [
        chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and len(f"a{chr(code)}b".splitlines()) > 1
    ]
    assert {"\n", "\r", "\x0b", "\x85", "\u2028", "\u2029"} <= set(ends)
    rows = [{"text": f"before{end}after"} for end in ends]
    for line_end in ("\n", "\r\n"):
        text = line_end.join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / "rows.jsonl").write_bytes((text + line_end).encode())
        assert list(native.read_json_lines(tmp_path / "rows.jsonl")) == rows
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 1')
    with pytest.raises(ValueError, match="delimiter"):
        list(native.read_json_lines(tmp_path / "rows.jsonl"))
