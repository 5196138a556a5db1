"""Extraction of a corpus beside the usual ways, each in a process of its own, on the same documents.

The target is a random Qwen2-0.5B shape (24 blocks, d 896, vocabulary 151,936, float32), read at block 16; lengths are
log-normal. Beside it: (a) a full forward pass with ``output_hidden_states=True``, padded in corpus order; (b) the
reference's own extractor, where a path to its code is given. Batch size and longest document are the same: the token
budget is their product. Loading is not timed; ours includes choosing positions and writing the store.

    python benchmarks/extract.py --reference PATH
    python benchmarks/extract.py --scale        time and memory over 1k, 10k and 100k documents, with a tiny target
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BLOCK, BATCH_SIZE, LONGEST, N_DOCUMENTS, THREADS, POSITIONS = 16, 8, 512, 32, 2, 10
SCALES = (1_000, 10_000, 100_000)


def words(n: int, seed: int = 0) -> list[str]:
    """Made-up words of natural lengths."""
    rng = random.Random(seed)
    return ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 9))) for _ in range(n)]


def text(rng: random.Random, vocabulary: list[str], median: float, longest: int) -> str:
    """A text whose length in words is log-normal; frequent words are frequent."""
    n = min(max(int(rng.lognormvariate(0, 0.9) * median), 12), longest)
    return " ".join(vocabulary[min(int(rng.paretovariate(0.7)) - 1, len(vocabulary) - 1)] for _ in range(n))


def make_target(folder: Path, **shape: int) -> None:
    """A random Qwen2 with a small BPE vocabulary trained on the made-up words, as a folder."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator([" ".join(words(3000))] * 3, vocab_size=4000, show_progress=False)
    backend.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().splitlines()[1:]
    Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(line.split()) for line in lines]).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(**shape, tie_word_embeddings=True, max_position_embeddings=32_768)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def ours(work: Path, corpus: str = "corpus.jsonl", store: str = "store", **settings: Any) -> dict[str, float]:
    """The store of a corpus; seconds without loading."""
    import nla.formats.pair  # noqa: F401 (imported at the end of an extraction; an import is not what is timed)
    from nla.train.data import extract
    from nla.train.data.corpus import CorpusSettings

    load, loading = extract.load_truncated, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        before = time.perf_counter(), time.process_time()
        view = load(*args, **kwargs)
        loading.extend([time.perf_counter() - before[0], time.process_time() - before[1]])
        return view

    extract.load_truncated = timed
    point = f"resid_post.{settings.pop('block', BLOCK)}"
    chosen = CorpusSettings(str(work / corpus), n_positions=POSITIONS, **settings)
    started = time.perf_counter(), time.process_time()
    reading = extract.ExtractionSettings(
        chosen, str(work / "target"), point, device="cpu", max_tokens_per_batch=BATCH_SIZE * LONGEST
    )
    manifest = extract.extract_corpus(reading, work / store)
    seconds, cpu = time.perf_counter() - started[0] - loading[0], time.process_time() - started[1] - loading[1]
    assert manifest is not None
    return {"tokens": manifest.counts["tokens"], "seconds": seconds, "cpu": cpu}


def full(work: Path) -> dict[str, float]:
    """The full forward pass, of which one layer is kept."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "target", padding_side="right")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model = AutoModelForCausalLM.from_pretrained(work / "target", dtype=torch.float32).eval()
    texts, kept, started = _texts(work), [], (time.perf_counter(), time.process_time())
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH_SIZE):
            batch = tokenizer(
                texts[start : start + BATCH_SIZE],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=LONGEST,
            )
            mask = batch["attention_mask"]
            out = model(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True, use_cache=False)
            layer = out.hidden_states[BLOCK + 1]
            kept += [layer[row, :n].clone() for row, n in enumerate(mask.sum(1).tolist())]
    return _figures(kept, started) | _difference(work, kept)


def reference(work: Path) -> dict[str, float]:
    """The reference's extractor; ``nla`` is its package in this process."""
    import torch

    from nla.datagen.extractors import HFExtractor  # type: ignore[import-not-found]

    options = {"device_map": "cpu", "torch_dtype": torch.float32, "max_length": LONGEST, "batch_size": BATCH_SIZE}
    extractor, texts = HFExtractor(str(work / "target"), **options), _texts(work)
    started = time.perf_counter(), time.process_time()
    kept = [result.hidden_states for result in extractor.extract(texts, BLOCK)]
    return _figures(kept, started) | _difference(work, kept)


def _texts(work: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (work / "corpus.jsonl").read_text().splitlines()]


def _figures(kept: list[Any], started: tuple[float, float]) -> dict[str, float]:
    seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    return {"tokens": sum(map(len, kept)), "seconds": seconds, "cpu": cpu}


def _difference(work: Path, kept: list[Any]) -> dict[str, float]:
    """How far the vectors that the store holds are from those found here."""
    import torch

    rows = torch.load(work / "rows.pt", weights_only=True)
    found = torch.stack([kept[d][i] for d, i in zip(rows["document"].tolist(), rows["index"].tolist(), strict=True)])
    return {"difference": float((found - rows["vectors"]).norm(dim=1).div(rows["vectors"].norm(dim=1)).max())}


def save_rows(work: Path) -> None:
    """The store's vectors and where they stand, for a process that cannot open it."""
    import torch

    from nla.store.reader import open_splits

    stores = open_splits(work / "store").values()
    columns = {
        "vectors": [store.vectors[:] for store in stores],
        "document": [store.documents() for store in stores],
        "index": [store.token_indexes() for store in stores],
    }
    torch.save({name: torch.cat(parts) for name, parts in columns.items()}, work / "rows.pt")


def peak_mib() -> float:
    """Largest resident size of this process; ``getrusage`` would count that of the process that started it, too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def child(way: str, work: Path, reference_path: str | None = None, **settings: Any) -> dict[str, float]:
    """Run one way in a fresh process; its figures and peak memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if way == "reference":
        environment["PYTHONPATH"] = str(reference_path)
    command = [sys.executable, __file__, "--child", way, "--work", str(work), "--settings", json.dumps(settings)]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def compare(work: Path, reference_path: str | None, rounds: int) -> None:
    """Print tokens/s and peak memory of each way."""
    (work / "target").mkdir()
    make_target(
        work / "target",
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    rng, vocabulary = random.Random(0), words(3000)
    lines = [json.dumps({"text": text(rng, vocabulary, 80, 600)}) + "\n" for _ in range(N_DOCUMENTS)]
    (work / "corpus.jsonl").write_text("".join(lines))
    ways = ["ours", "full", *(["reference"] if reference_path else [])]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            more = {"first_position": 0, "max_tokens": LONGEST, "store": f"store{number or ''}", "eval_fraction": 0.3}
            found[way].append(child(way, work, reference_path, **(more if way == "ours" else {})))
            if way == "ours" and number == 0:
                save_rows(work)
    n_tokens = {way: runs[0]["tokens"] for way, runs in found.items()}
    assert len(set(n_tokens.values())) == 1, n_tokens
    print(f"{N_DOCUMENTS} documents, {n_tokens['ours']:.0f} tokens, block {BLOCK} of 24, float32, {THREADS} threads;")
    print(f"batches of {BATCH_SIZE} documents of at most {LONGEST} tokens (ours: {BATCH_SIZE * LONGEST} with padding);")
    print(f"{POSITIONS} positions a document; best of {rounds} rounds, ways in turn")
    best = {way: {key: min(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
    for way, figures in best.items():
        print(
            f"{way:10s} {figures['tokens'] / figures['seconds']:7.0f} tokens/s "
            f"{figures['tokens'] / figures['cpu']:7.0f} tokens/CPU s {figures['peak_mib']:7.0f} MiB at most"
            + (f"   largest relative difference from ours {figures['difference']:.0e}" if way != "ours" else "")
        )
    for way in ways[1:]:
        ratios = {key: best[way][key] / best["ours"][key] for key in ("seconds", "cpu", "peak_mib")}
        print(
            f"ours beside {way}: {ratios['seconds']:.2f} × as fast by the clock, {ratios['cpu']:.2f} × by CPU time, "
            f"1/{ratios['peak_mib']:.2f} of the memory"
        )


def scale(work: Path) -> None:
    """Print time and peak memory over corpora of growing size."""
    (work / "target").mkdir()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    make_target(work / "target", vocab_size=4096, num_key_value_heads=2, **shape)
    vocabulary = words(3000)
    for n in SCALES:
        rng = random.Random(0)
        with (work / "corpus.jsonl").open("w") as file:
            for _ in range(n):
                file.write(json.dumps({"text": text(rng, vocabulary, 40, 400)}) + "\n")
        figures = child("ours", work, store=f"store{n}", block=0, first_position=8, max_tokens=LONGEST)
        print(
            f"{n:7d} documents {figures['tokens']:9.0f} tokens {figures['seconds']:7.1f} s "
            f"{1e3 * figures['seconds'] / n:6.2f} ms a document ({1e3 * figures['cpu'] / n:.2f} of CPU) "
            f"{figures['peak_mib']:6.0f} MiB at most",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="folder with the reference's code")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", action="store_true", help="time and memory over corpora of growing size")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        ways: dict[str, Any] = {"ours": ours, "full": full, "reference": reference}
        figures = ways[options.child](Path(options.work), **json.loads(options.settings))
        print(json.dumps({**figures, "peak_mib": peak_mib()}))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        if options.scale:
            scale(Path(folder))
        else:
            compare(Path(folder), options.reference, options.rounds)


if __name__ == "__main__":
    main()
