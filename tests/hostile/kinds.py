"""The kinds of artefact: how a valid one is made, which of its files turn hostile, and how it is then used.

A use raises a typed error, or asserts that all it was given is finite and right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import parity_pairs as pairs  # type: ignore[import-not-found]

from nla import NLA
from nla.config import CONFIG_FILE
from nla.errors import HubError
from nla.formats import easynla, kitft, parquet
from nla.models.load import load_target, load_truncated
from nla.models.read import Activations, read
from nla.pair.explanations import Explanations
from nla.pair.publish import push_folder
from nla.storage.hashes import digest
from nla.storage.tensors import hash_tensors
from nla.store.reader import BASELINES_FILE, SPLITS, Store, open_splits
from nla.store.shards import Document
from nla.store.writer import StoreWriter
from nla.text.tokens import Span, encode, load_tokenizer, render_prompt
from tests.helpers.adapters import lora_folder
from tests.helpers.tiny import TEXTS, make_model, make_pair, make_tokenizer
from tests.hostile.mutate import mutate, read_tensors, write_tensors


class Kind(NamedTuple):
    """One kind of artefact in a folder of its own."""

    make: Callable[[Path], None]
    files: Sequence[str]
    """Patterns of the files that turn hostile."""
    use: Callable[[Path], None]
    repair: Callable[[Path], None] = lambda folder: None
    """Make hashes right again: hostile is what somebody made whole, not what a disk damaged."""
    mutate: Callable[[Path, Random], None] = mutate


def break_one(kind: Kind, folder: Path, seed: str) -> str:
    """Make one file of a valid artefact hostile; its name."""
    random = Random(seed)
    files = sorted(path for pattern in kind.files for path in folder.glob(pattern))
    path = random.choice(files)
    kind.mutate(path, random)
    kind.repair(folder)
    return str(path.relative_to(folder))


def _json(path: Path) -> Any:
    """A file's JSON; None if it has none any more."""
    try:
        return json.loads(path.read_text()) if path.is_file() and path.stat().st_size < 2**24 else None
    except (ValueError, RecursionError, OSError):
        return None


def _seal_tensors(folder: Path) -> None:
    """Our checksum in every safetensors file that can still be read."""
    for path in folder.rglob("*.safetensors"):
        if not path.is_file() or not 8 < path.stat().st_size < 2**24:
            continue
        try:
            header, data = read_tensors(path)
            if "sha256" in header.get("__metadata__", {}):
                header["__metadata__"] = {"sha256": hash_tensors(load(path.read_bytes()))}
                write_tensors(path, header, data)
        except Exception:
            continue


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 2**24


# Pairs


def make_pair_folder(folder: Path) -> None:
    make_model().save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    pair = make_pair(target=str(folder / "target"), scale=0.3)
    acts = pair.read(TEXTS)
    score = pair.score(acts, pair.reconstruct(pair.explain(acts, samples=1, max_new_tokens=4)), n_boot=10)
    pair.metrics = {
        "score": score.to_json(),
        "joint": {"fve/global": 0.5, "fve/x": 0.1},
        "data": "texts",
        "recipe": "r",
    }
    pair.save_pretrained(folder / "pair")


def seal_pair(folder: Path) -> None:
    _seal_tensors(folder)
    content = _json(folder / "pair" / CONFIG_FILE)
    if not isinstance(content, dict):
        return
    content.pop("checksum", None)
    files = content.get("files")
    if isinstance(files, dict):
        content["files"] = {
            n: _sha256(folder / "pair" / n) if _ok(folder / "pair" / n) else v for n, v in files.items()
        }
    text = json.dumps({**content, "checksum": f"sha256:{digest(content)}"})
    (folder / "pair" / CONFIG_FILE).write_text(text)


def _ok(path: Path) -> bool:
    try:
        return _is_small(path)
    except (OSError, ValueError):
        return False


def use_pair(folder: Path) -> None:
    nla = NLA.from_pretrained(folder / "pair", device="cpu")
    acts = nla.read(TEXTS[:2])
    notes = nla.explain(acts, samples=1)
    predicted = nla.reconstruct(notes)
    assert acts.vectors.isfinite().all() and predicted.isfinite().all()
    assert all(math.isfinite(cosine) for note in notes for cosine in note.cosine)
    if "global" in nla.baselines:
        assert math.isfinite(nla.score(acts, predicted, n_boot=5).fve.value)


def make_card_folder(folder: Path) -> None:
    pair = make_pair()  # its target is on a hub
    pair.metrics = {"score": pair.score(pair.read(TEXTS), torch.randn(len(pair.read(TEXTS)), 32), n_boot=10).to_json()}
    pair.metrics |= {"joint": {"fve/global": 0.5, "fve/x": 0.1}, "data": "texts"}
    pair.save_pretrained(folder / "pair")


def use_card(folder: Path) -> None:
    with contextlib.suppress(HubError):  # there is none here: all that comes before it is done
        push_folder(folder / "pair", "someone/pair")


# Targets and adapters


def make_target(folder: Path) -> None:
    make_model().save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")


def use_target(folder: Path) -> None:
    model, tokenizer = load_target(folder / "target", device="cpu")
    view = load_truncated(folder / "target", "resid_post.1", device="cpu")
    for reader in (model, view):
        assert read(reader, tokenizer, TEXTS[:1], "resid_post.1").vectors.isfinite().all()


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "target")
    assert all(isinstance(token, int) for token in render_prompt(tokenizer, "Explain"))
    encoded = encode(tokenizer, TEXTS[0], 1000)
    assert all(TEXTS[0][span.start : span.end] == span.text for span in encoded.spans)


def make_adapter(folder: Path) -> None:
    make_target(folder)
    lora_folder(folder / "adapter")


def use_adapter(folder: Path) -> None:
    model, tokenizer = load_target(folder / "target", device="cpu", adapter=folder / "adapter")
    assert read(model, tokenizer, TEXTS[:1], "resid_post.1").vectors.isfinite().all()


def use_planted(folder: Path) -> None:
    nla = make_pair()
    with nla.planted(folder / "adapter"):
        assert nla.read(TEXTS[:1]).vectors.isfinite().all()
    assert nla.read(TEXTS[:1]).vectors.isfinite().all()


# Stores

ABOUT = {"target": "a/target", "revision": None, "tokenizer_hash": "t", "point": "resid_post.1", "dtype": "float32"}
ABOUT |= {"d_model": 6, "settings": {"seed": 0}}  # type: ignore[dict-item]


def make_store(folder: Path) -> None:
    writer = StoreWriter(folder / "store", ABOUT)
    generator = torch.Generator().manual_seed(0)
    for chunk in range(2):
        splits = {}
        for split in SPLITS:
            documents = []
            for number in range(2):
                text = f"{split} ✓ {chunk} {number}"
                spans = [Span(i + 1, text[i], i, i + 1, i) for i in range(len(text) - 3, len(text))]
                documents.append(Document(10 * len(split) + 2 * chunk + number, text, spans, ["user", "tool", "tool"]))
            splits[split] = (documents, torch.randn(6, 6, generator=generator) + 1)
        writer.write(chunk, splits, {"seen": 4})
    writer.finish(2)


def seal_store(folder: Path) -> None:
    _seal_tensors(folder)
    path = folder / "store" / "manifest.json"
    content = _json(path)
    try:
        for entries in content["shards"].values():
            for entry in entries:
                shard = folder / "store" / entry["file"]
                if _is_small(shard):
                    entry |= {"bytes": shard.stat().st_size, "sha256": _sha256(shard)}
                elif shard.is_file():
                    entry["bytes"] = shard.stat().st_size
        if _is_small(folder / "store" / BASELINES_FILE):
            content["baselines_sha256"] = _sha256(folder / "store" / BASELINES_FILE)
        path.write_text(json.dumps(content))
    except (TypeError, KeyError, AttributeError, OSError, ValueError):
        return


def use_store(folder: Path) -> None:
    for store in open_splits(folder / "store").values():
        acts = store.activations()
        assert acts.vectors.isfinite().all() and len(acts.spans) == len(store) == store.vectors.shape[0]
        for span, row, prefix in zip(acts.spans, acts.document, store.prefixes(), strict=True):
            assert acts.texts[row][span.start : span.end] == span.text and acts.texts[row].startswith(prefix)
        assert all(isinstance(name, str) for name in store.strata())
        assert len(store.documents()) == len(store.token_indexes()) == len(store)
        assert all(b.mean.isfinite().all() and math.isfinite(b.variance) for b in store.baselines.values())
        assert math.isfinite(store.manifest.norms["mean"])
        store.verify()
        parquet.export_parquet(store, folder / "out.parquet")


def use_begun_store(folder: Path) -> None:
    (folder / "store" / "manifest.json").unlink()
    writer = StoreWriter(folder / "store", ABOUT)
    manifest = writer.finish(2)
    if manifest is not None:
        Store.open(folder / "store").vectors[:].isfinite().all()


def make_activations(folder: Path) -> None:
    make_pair().read(TEXTS).save(folder / "acts")


def use_activations(folder: Path) -> None:
    acts = Activations.load(folder / "acts")
    assert acts.vectors.isfinite().all() and acts.vectors.ndim == 2
    for span, row in zip(acts.spans, acts.document.tolist(), strict=True):
        assert acts.texts[row][span.start : span.end] == span.text
    assert all(isinstance(name, str) for name in [*acts.strata, *acts.texts, acts.point])


def make_explanations(folder: Path) -> None:
    nla = make_pair()
    nla.explain(nla.read(TEXTS), samples=2, max_new_tokens=4).save(folder / "said")


def use_explanations(folder: Path) -> None:
    said = Explanations.load(folder / "said")
    assert all(math.isfinite(value) for one in said for value in (*one.cosine, *one.trust[1:]) if value is not None)
    for one in said:
        if one.document is not None and one.span is not None and said.documents:
            assert said.documents[one.document][one.span.start : one.span.end] == one.token
    said.to_html()
    said.to_dataframe()


# Other projects


def make_kitft(folder: Path) -> None:
    pairs.full_pair(folder, "llama")


def use_kitft(folder: Path) -> None:
    nla = kitft.load(folder / "av", folder / "ar", folder / "target", device="cpu")
    nla.save_pretrained(folder / "out")
    again = NLA.from_pretrained(folder / "out", device="cpu")
    acts = again.read("the cat sat on the mat.")
    assert again.reconstruct(again.explain(acts, samples=1, max_new_tokens=4)).isfinite().all()


def make_easynla(folder: Path) -> None:
    pairs.lora_pair(folder, "llama")


def use_easynla(folder: Path) -> None:
    nla = easynla.load(folder / "av", target=folder / "target", dtype="float32", device="cpu")
    acts = nla.read("the cat sat on the mat.")
    assert nla.reconstruct(nla.explain(acts, samples=1, max_new_tokens=4)).isfinite().all()


def make_parquet(folder: Path) -> None:
    make_tokenizer().save_pretrained(folder / "tokenizer")
    random, rows = Random(0), []
    for number in range(20):
        words = random.choices(["the", "cat", "dog", "red", "sat"], k=8)
        for n in (6, 8):
            vector = [random.gauss(1, 1) for _ in range(4)]
            rows.append((n, " ".join(words[:n]), vector, 5, f"corpus:train:{number}"))
    kinds = [pa.int64(), pa.string(), pa.list_(pa.float32(), 4), pa.int64(), pa.string()]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    table = pa.Table.from_arrays(columns, names=list(parquet.COLUMNS))
    pq.write_table(table, folder / "base.parquet")
    extraction = {"base_model": "a/model", "d_model": 4, "layer_index": 5, "norm": "none", "corpus": "c"}
    sidecar = {"kind": "nla_dataset", "schema_version": 1, "row_count": len(rows), "extraction": extraction}
    parquet.sidecar_path(folder / "base.parquet").write_text(json.dumps(sidecar))


def mutate_table(path: Path, random: Random) -> None:
    """A parquet file with a column of another type or with other values; or any other file made hostile."""
    if path.suffix != ".parquet" or random.random() < 0.2:
        return mutate(path, random)
    table = pq.read_table(path)
    at = random.randrange(table.num_columns)
    name, old = table.schema.names[at], table.column(at).to_pylist()
    n = len(old)
    columns = [
        pa.array([b"\xff\xfe"] * n, pa.binary()),
        pa.array(["x"] * n).dictionary_encode(),
        pa.array([None] * n),
        pa.array([None, *old[1:]], table.schema.field(at).type),
        pa.array([[["x"]]] * n),
        pa.array([{"a": 1}] * n),
        pa.array([0.5] * n),
        pa.array([10**18] * n),
        pa.array([-1] * n),
        pa.array([""] * n),
        pa.array(["x" * 100_000] * n),
        pa.array(["\x1b[2J\u202e"] * n),
        pa.array([True] * n),
        pa.array([[1.0] * k for k in range(n)]),
        pa.array([[math.nan] * 4] * n, pa.list_(pa.float32(), 4)),
        pa.array([[3e38] * 4] * n, pa.list_(pa.float32(), 4)),
        pa.array([[1e300] * 4] * n, pa.list_(pa.float64(), 4)),
        pa.array([[1, 2, 3, 4]] * n, pa.list_(pa.int64())),
        pa.array([["1"] * 4] * n),
        pa.array([[None, 1.0, 2.0, 3.0]] * n, pa.list_(pa.float32(), 4)),
        pa.array([[0.0] * 4] * n, pa.list_(pa.float32(), 4)),
        pa.StringArray.from_buffers(n, pa.py_buffer(_offsets(n)), pa.py_buffer(b"\xff\xfe" * n)),
    ]
    column = random.choice(columns)
    act = random.choice(["replace"] * 6 + ["drop", "twice", "rename"])
    if act == "replace":
        table = table.set_column(at, name, column)
    elif act == "drop":
        table = table.drop_columns([name])
    elif act == "twice":
        table = table.append_column(name, column)
    else:
        table = table.rename_columns([f"{n}\n" if n == name else n for n in table.schema.names])
    pq.write_table(table, path)


def _offsets(n: int) -> bytes:
    return b"".join((2 * k).to_bytes(4, "little") for k in range(n + 1))


def use_parquet(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    parquet.import_parquet(folder / "base.parquet", folder / "store", tokenizer, eval_fraction=0.3)
    for split in SPLITS:
        use = Store.open(folder / "store", split)
        assert use.activations().vectors.isfinite().all() and use.prefixes()


TOKENIZER_FILES = ["target/tokenizer*.json", *["target/chat_template.jinja"] * 2]
KINDS = {
    "pair": Kind(make_pair_folder, ["pair/**/*.json", "pair/**/*.safetensors"], use_pair, seal_pair),
    "card": Kind(make_card_folder, ["pair/README.md", "pair/metrics.json"], use_card, seal_pair),
    "target": Kind(make_target, ["target/*config.json", "target/*.safetensors"], use_target),
    "tokenizer": Kind(make_target, TOKENIZER_FILES, use_tokenizer),
    "adapter": Kind(make_adapter, ["adapter/*"], use_adapter, _seal_tensors),
    "planted adapter": Kind(make_adapter, ["adapter/*"], use_planted, _seal_tensors),
    "store": Kind(make_store, ["store/*.json", "store/*.safetensors", "store/*/*.safetensors"], use_store, seal_store),
    "begun store": Kind(make_store, ["store/store.json", "store/chunks/*", "store/*/*.safetensors"], use_begun_store),
    "activations": Kind(make_activations, ["acts/*"], use_activations, _seal_tensors),
    "explanations": Kind(make_explanations, ["said/*"], use_explanations),
    "kitft": Kind(make_kitft, ["a[vr]/nla_meta.yaml", "a[vr]/config.json", "ar/value_head.safetensors"], use_kitft),
    "easynla": Kind(make_easynla, ["av/*.json", "av/*.yaml", "av/*.safetensors", "av/critic/*"], use_easynla),
    "parquet": Kind(make_parquet, ["base.parquet", "base.parquet.nla_meta.yaml"], use_parquet, mutate=mutate_table),
}
