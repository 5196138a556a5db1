"""Run other projects' own code on pairs and write down what it computes; called by parity.py as a process of its own.

    python benchmarks/parity_reference.py kitft|easynla CLONE JOBS

JOBS is a JSON file: a list of {"folders": [AV, AR] or [AV, AR, TARGET], "inputs": FILE, "out": FILE}. The inputs are a
safetensors file with "vectors" (n, d) and its texts in the metadata; what comes out holds "ids", "entered" (what enters
the model where the activation is injected), "decoded" (n, d) and "scores" (n, 2) or "logits". This file imports nothing
of this library, and changes nothing in the clone.
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
import types
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


class PlainTokenizer:
    """A tokenizer whose chat template gives a list of ids, as transformers 4 did and the reference expects."""

    last_prompt: list[int]

    def __init__(self, folder: str) -> None:
        self.inner = PreTrainedTokenizerFast.from_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> PlainTokenizer:
        return cls(folder)

    def apply_chat_template(self, messages: list, tokenize: bool = True, **kwargs: Any) -> Any:
        found = self.inner.apply_chat_template(messages, tokenize=tokenize, **kwargs)
        if not tokenize:
            return found
        PlainTokenizer.last_prompt = found["input_ids"] if hasattr(found, "keys") else found
        return PlainTokenizer.last_prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Recorder(http.server.BaseHTTPRequestHandler):
    """A server on loopback that keeps the embeddings it is sent and answers with a constant explanation."""

    seen: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Recorder.seen.append(body["input_embeds"])
        answer = json.dumps({"text": "<explanation>the cat</explanation>"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


def read_inputs(path: str) -> tuple[torch.Tensor, list[str]]:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("vectors"), json.loads(file.metadata()["texts"])


def kitft(av: str, ar: str, inputs: str, out: str) -> None:
    """The reference's client: what it sends to its server, and what its critic makes of texts."""
    import nla_inference as reference  # type: ignore[import-not-found]

    reference.AutoTokenizer = PlainTokenizer
    vectors, texts = read_inputs(inputs)
    Recorder.seen.clear()
    server = http.server.HTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = reference.NLAClient(av, sglang_url=f"http://127.0.0.1:{server.server_port}")
    # The client looks embeddings up in bfloat16; its own function gives them in float32 as well.
    client.embed = reference.load_embedding_only(av, dtype=torch.float32)
    for vector in vectors:
        if client.generate(vector) != "the cat":
            raise RuntimeError("the client did not read the server's answer")
    server.shutdown()
    critic = reference.NLACritic(ar, dtype=torch.float32)
    results = {
        "ids": torch.tensor(PlainTokenizer.last_prompt),
        "entered": torch.tensor(Recorder.seen),
        "decoded": torch.stack([critic.reconstruct(text) for text in texts]),
        "scores": torch.tensor([critic.score(text, vector) for text, vector in zip(texts, vectors, strict=True)]),
    }
    save_file(results, out)


def easynla(av: str, ar: str, target: str, inputs: str, out: str) -> None:
    """EasyNLA's injection hook on its AV, and its decoder as its joint training rebuilds it."""
    import accelerate  # noqa: F401 (before the stand-in below, which it would take for the logger itself)
    from peft import LoraConfig, PeftModel, inject_adapter_in_model

    sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # their trainer imports it, and is not called here
    from nla.config import load_nla_config  # type: ignore[import-not-found]
    from nla.train_sft import init_critic_from_base  # type: ignore[import-not-found]
    from nla.utils import (
        build_prompt_text,
        critic_predict,
        register_karvonen_hook,  # type: ignore[import-not-found]
    )
    from nla.utils.arch_adapters import resolve_decoder_layers  # type: ignore[import-not-found]

    vectors, texts = read_inputs(inputs)
    tokenizer: Any = PlainTokenizer(target)
    config = load_nla_config(av, tokenizer)
    base = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    actor: Any = PeftModel.from_pretrained(base, av).eval()
    held: list = [None]
    marker = (config.injection_token_id, config.injection_left_neighbor_id, config.injection_right_neighbor_id)
    register_karvonen_hook(actor, held, *marker)
    content = config.actor_prompt_template.replace("{injection_char}", "<INJECT>")
    text = build_prompt_text([{"role": "user", "content": content}], config.injection_char, tokenizer)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].repeat(len(vectors), 1)
    entered: list[torch.Tensor] = []
    next_block = resolve_decoder_layers(actor.get_base_model())[2]
    next_block.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach().clone()))
    held[0] = vectors
    with torch.no_grad():
        logits = actor(ids).logits

    meta = json.loads((Path(ar) / "ar_meta.json").read_text())
    critic = init_critic_from_base(
        target, meta["ar_num_layers"], torch.float32, strip_final_norm=meta["final_norm_stripped"]
    )
    lora = LoraConfig(
        r=meta["lora_r"],
        lora_alpha=meta["lora_alpha"],
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=True,
        target_modules=meta["target_modules"],
    )
    inject_adapter_in_model(lora, critic.backbone)
    _, unexpected = critic.load_state_dict(load_file(str(Path(ar) / "ar_lora_value_head.safetensors")), strict=False)
    if unexpected:
        raise RuntimeError(f"names that EasyNLA does not know: {unexpected[:3]}")
    decoded = []
    for explanation in texts:
        prompt = config.critic_prompt_template.format(explanation=explanation)
        row = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        with torch.no_grad():
            decoded.append(critic_predict(critic.eval(), row, torch.ones_like(row), config.mse_scale)[0])
    results = {"ids": ids[0], "entered": entered[0], "logits": logits, "decoded": torch.stack(decoded)}
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)


if __name__ == "__main__":
    project, clone, jobs = sys.argv[1:]
    torch.set_num_threads(1)
    sys.path.insert(0, clone)
    for job in json.loads(Path(jobs).read_text()):
        {"kitft": kitft, "easynla": easynla}[project](*job["folders"], job["inputs"], job["out"])
