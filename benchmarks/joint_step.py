"""Joint training's step: nla beside a plain script, the same work in one run, steps in turn.

The plain script is what one writes first: TRL's stock GRPOTrainer, transformers' generate through the adapters, prompts
padded on the left, an injection by a hook, and for the decoder a second model of full depth, updated in the reward
function. Both get the same activations, prompt, longest answer, texts to replay and rates. The decoders read a text
of each answer's length, as much as after a warm start. SmolLM2 has its real weights if they are given or
`make real` has installed them; otherwise they are random, in its shape.

    python benchmarks/joint_step.py --shape smollm2 --dtype bfloat16
    python benchmarks/joint_step.py --shape couplets
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from trl import GRPOConfig, GRPOTrainer

from nla.autoencoder import NLA
from nla.errors import NLAError
from nla.metrics import Baseline, mse, rescale
from nla.models.hooks import inference, inject
from nla.models.load import load_target
from nla.models.merged import MergedCopy
from nla.models.points import blocks, linear_names
from nla.organisms.couplets import world as couplets
from nla.pair.roles import Head
from nla.text.tokens import render_prompt
from nla.train.fit.joint import JointSettings, JointTrainer, build_trainer, marker_forbidden
from nla.train.fit.loop import Phases, own_forward
from nla.train.fit.reward import LEAST_ERROR, DecoderReward
from nla.train.pair_config import DECODER_TEMPLATE, ENCODER_PROMPT, Prompts, pair_config

RANK, N_VECTORS = 32, 512
PHASES = ("sampling", "log_probs", "reference", "backward", "decoder", "optimizer")
SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
SMOLLM2_POINT = "resid_post.19"
SENTENCE = (
    "A short story about a lighthouse keeper, told by a friend; the next words say what the storm did to the boat."
)


def make_pair(shape: str, weights: str | None, dtype: str, n_tokens: int) -> NLA:
    """A pair whose adapters do something, as after a warm start."""
    if shape == "couplets":
        return pair_on(*load_target("couplets/planner", dtype=dtype, device="cpu"), shape, dtype, n_tokens)
    try:
        target, tokenizer = load_target(weights or "smollm2", dtype=dtype, device="cpu")
    except NLAError as error:
        print(f"random weights: {error}")
        return pair_on(random_target(SMOLLM2, dtype), None, shape, dtype, n_tokens, SMOLLM2_POINT)
    usual = Prompts(ENCODER_PROMPT, DECODER_TEMPLATE)
    return pair_on(target, tokenizer, shape, dtype, n_tokens, SMOLLM2_POINT, usual)


def random_target(config: PretrainedConfig, dtype: str, device: str = "cpu") -> Any:
    """A model of this shape with random weights, made where it will be."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def pair_on(
    target: Any,
    tokenizer: Any,
    name: str,
    dtype: str,
    n_tokens: int,
    point: str | None = None,
    prompts: Prompts | None = None,
) -> NLA:
    """A pair whose adapters do something; tokenizer, point and prompts are Couplets' where none is given."""
    shipped = NLA.from_pretrained("couplets", device="cpu")
    if prompts is None:
        marker = shipped.config.injection.marker
        usual = Prompts(shipped.config.encoder_prompt.replace(marker, "{marker}"), "")
        prompts = usual._replace(decoder=shipped.config.decoder_template, marker=marker)
    tokenizer, d_model = tokenizer or shipped.tokenizer, target.config.hidden_size
    config = pair_config(
        name,
        None,
        tokenizer,
        point or shipped.config.point,
        prompts,
        d_model=d_model,
        dtype=dtype,
        quantization=None,
        max_new_tokens=n_tokens,
        activation_norm=d_model**0.5,
        injection_norm=None,
        head_bias=True,
    )
    vectors = torch.randn(50, d_model, generator=torch.Generator().manual_seed(1))
    nla = NLA.create(target, tokenizer, config, rank=RANK, baselines={"global": Baseline.fit(vectors)})
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in nla.model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = (0.01 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return nla


def text_of(nla: NLA, n_tokens: int) -> str:
    """An explanation of about so many tokens, which both decoders read."""
    words = (
        SENTENCE * 20 if nla.config.d_model == SMOLLM2.hidden_size else couplets.sample(40, 0)[0].text * 20
    ).split()
    return " ".join(words[:n_tokens])


def texts_of(nla: NLA, completion_ids: list[list[int]]) -> list[str]:
    """For each answer, an explanation of its length: what an untrained encoder writes is seldom one."""
    return [text_of(nla, max(1, len(ids))) for ids in completion_ids]


def our_trainer(nla: NLA, vectors: Tensor, texts: list[str], settings: JointSettings, folder: Path) -> JointTrainer:
    trainer = build_trainer(nla, vectors, ["all"] * len(vectors), texts, folder, settings)
    reward: DecoderReward = trainer.reward
    reward.read = lambda completion_ids: list(texts_of(nla, completion_ids))
    return trainer


class PlainTrainer(GRPOTrainer):
    """The stock trainer, with what an injection by a hook needs: the vectors of the rows that a pass is over."""

    vectors: Tensor
    marker_id: int

    def inject_by_hook(self, vectors: Tensor, marker_id: int, norm: float) -> None:
        self.vectors, self.marker_id, self.now = rescale(vectors, norm), marker_id, torch.empty(0)
        self.model.get_input_embeddings().register_forward_hook(self.overwrite)  # pyright: ignore

    def overwrite(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        rows, columns = (args[0] == self.marker_id).nonzero(as_tuple=True)
        if output.shape[1] == 1 or not len(rows):
            return None
        output = output.clone()
        output[rows, columns] = self.now[rows].to(output.dtype)
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.now = self.vectors[torch.tensor([row["row"] for row in inputs])]
        return super()._generate_and_score_completions(inputs) | {"vectors": self.now}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.now = inputs["vectors"]
        return super()._compute_loss(model, inputs)


class PlainDecoder:
    """A second model of full depth with an adapter and a head, which learns in the reward function."""

    __name__ = "reconstruction"

    def __init__(self, nla: NLA, model: Any, vectors: Tensor, texts: list[str], s: JointSettings) -> None:
        self.nla, self.model, self.vectors, self.texts, self.s = nla, model, vectors, texts, s
        self.layer, self.head = nla.config.layer, Head(nla.config.d_model)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.parameters = [*trained, *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=s.decoder_learning_rate, weight_decay=0.0)
        self.tokenizer = copy.deepcopy(nla.tokenizer)
        self.tokenizer.padding_side = "right"

    def __call__(self, completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
        texts, rewards = texts_of(self.nla, completion_ids), torch.empty(len(row))
        with torch.enable_grad():
            for part in torch.arange(len(texts)).tensor_split(self.s.decoder_mini_batches):
                replayed = torch.randint(len(self.texts), (round(self.s.replay_fraction * len(part)),))
                rows = torch.cat([torch.tensor(row)[part], replayed])
                read = [texts[i] for i in part.tolist()] + [self.texts[i] for i in replayed.tolist()]
                errors = mse(self.vectors[rows], self.reconstruct(read))
                gain = -errors.clamp(min=LEAST_ERROR).log()
                self.optimizer.zero_grad()
                (-gain.mean()).backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                rewards[part] = gain[: len(part)].detach()
        return rewards.tolist()

    def reconstruct(self, texts: list[str]) -> Tensor:
        prompts = [self.nla.config.decoder_template.replace("{explanation}", text) for text in texts]
        batch: Any = self.tokenizer(prompts, return_tensors="pt", padding=True)
        half = self.model.dtype != torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        last = batch["attention_mask"].sum(dim=1) - 1
        return self.head(out.hidden_states[self.layer + 1][torch.arange(len(last)), last])


def plain_trainer(nla: NLA, vectors: Tensor, texts: list[str], s: JointSettings, folder: Path) -> PlainTrainer:
    """On copies of the pair's base, so that the two trainers share nothing."""
    base = bare_copy(nla)
    adapters = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linear_names(base), task_type="CAUSAL_LM")
    decoder = PlainDecoder(nla, get_peft_model(bare_copy(nla), adapters), vectors, texts, s)
    half = base.dtype != torch.float32
    config, tokenizer = nla.config, copy.deepcopy(nla.tokenizer)
    tokenizer.padding_side = "left"
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=s.rows,
        num_generations=s.group_size,
        max_completion_length=config.max_new_tokens,
        beta=s.beta,
        loss_type="grpo",
        learning_rate=s.encoder_learning_rate,
        gradient_checkpointing=False,
        bf16=half,
        use_cpu=True,
        report_to="none",
        router_aux_loss_coef=0.0,
    )
    prompt = tokenizer.decode(render_prompt(tokenizer, config.encoder_prompt))
    rows: Any = Dataset.from_dict({"prompt": [prompt] * len(vectors), "row": list(range(len(vectors)))})
    model: Any = get_peft_model(base, copy.deepcopy(adapters))
    trainer = PlainTrainer(
        model, reward_funcs=[decoder], args=arguments, train_dataset=rows, processing_class=tokenizer
    )  # pyright: ignore
    trainer.inject_by_hook(vectors, config.injection.marker_id, config.injection.norm or 1.0)
    trainer.create_optimizer()
    return trainer


def bare_copy(nla: NLA) -> Any:
    """A copy of the pair's base without its adapters."""
    merged = MergedCopy(nla.model, "default")
    merged.refresh()
    bare = copy.deepcopy(merged.model)
    bare.__dict__.pop("peft_config", None)  # else PEFT takes its adapters for there
    return bare


def timed_phases(trainer: Any) -> Phases:
    """Time a stock trainer's phases as ours times its own."""
    phases = Phases(torch.device("cpu"))

    def timing(name: str, phase_of: Callable[[], str]) -> None:
        inner = getattr(trainer, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            with phases.timed(phase_of()):
                return inner(*args, **kwargs)

        setattr(trainer, name, outer)

    timing("_generate_single_turn", lambda: "sampling")
    timing("_calculate_rewards", lambda: "decoder")
    timing("_get_per_token_logps_and_entropies", lambda: "log_probs" if torch.is_grad_enabled() else "reference")
    timing("training_step", lambda: "backward")
    return phases


def step(trainer: Any, phases: Phases, rows: list[int], group_size: int) -> None:
    """One update of encoder and decoder on ``rows``."""
    inputs = [trainer.train_dataset[row] for row in rows for _ in range(group_size)]
    trainer.training_step(trainer.model, inputs, None)
    with phases.timed("optimizer"):
        torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()


@contextlib.contextmanager
def peak_memory(peaks: list[float]) -> Iterator[None]:
    """Adds to ``peaks`` what the block held at most above what was there before, in MB."""
    page, done = os.sysconf("SC_PAGE_SIZE"), threading.Event()

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6

    most = before = 0.0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, resident())

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the other side has given back is not there to be used again
    most = before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        peaks.append(most - before)


def weights_mb(*modules: nn.Module) -> float:
    parameters = {p.data_ptr(): p.nbytes for module in modules for p in module.parameters()}
    return sum(parameters.values()) / 1e6


def matmul_rate(nla: NLA, rows: int = 512) -> float:
    """FLOP/s of the model's own largest product in a block, in its type, on this machine now."""
    weights = [p for p in blocks(nla.base)[0].parameters() if p.ndim == 2 and "lora" not in str(p)]
    weight = max(weights, key=lambda w: w.numel())
    entering, spent = torch.randn(rows, weight.shape[1]).to(weight.dtype), []
    for _ in range(20):
        started = time.perf_counter()
        nn.functional.linear(entering, weight)
        spent.append(time.perf_counter() - started)
    return 2 * rows * weight.numel() / min(spent)


def floor(nla: NLA, s: JointSettings, n_tokens: int) -> dict[str, float]:
    """FLOPs that each phase of our step cannot do without: products with the base's weights, every token once."""
    in_blocks = sum(p.numel() for n, p in blocks(nla.base).named_parameters() if "lora_" not in n)
    head = nla.base.get_output_embeddings().weight.numel()  # pyright: ignore
    of_cut = in_blocks * (nla.config.layer + 1) / len(blocks(nla.base))
    prompt = nla.marker_position + (nla.prompt_ids.shape[1] - nla.marker_position) * s.prompts_per_step
    written = s.rows * n_tokens
    once = 2 * (prompt * in_blocks + written * (in_blocks + head))
    read = s.rows * (1 + s.replay_fraction) * (n_tokens + len(render(nla)))
    return {
        "sampling": once,
        "log_probs": once + 2 * written * head,  # the slope of the logits is made with them
        "reference": once,
        "backward": 2 * (prompt + written) * in_blocks,
        "decoder": 4 * read * of_cut,
        "optimizer": 0.0,
    }


def render(nla: NLA) -> list[int]:
    return nla.decoder.prompt_rows([""], strict=False)[0]


def log_prob_differences(trainer: JointTrainer, rows: list[int], group_size: int) -> dict[str, float]:
    """Largest and mean difference, over a step's tokens, between log-probabilities of one model made in other ways."""
    inputs = [trainer.train_dataset[row] for row in rows for _ in range(group_size)]
    with marker_forbidden(trainer.model, trainer.marker_id), torch.no_grad():  # pyright: ignore
        batch = trainer._generate_and_score_completions(inputs)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width, real = batch["completion_ids"].shape[1], batch["completion_mask"].bool()

        def log_probs(shares: bool) -> Tensor:
            trainer.shares_prompt = shares
            with trainer.using(batch["vectors"]):
                return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0][real]

        shared, whole = log_probs(True), log_probs(False)
        trainer.shares_prompt = True
        assert trainer.merged is not None
        trainer.merged.refresh()
        merged: Any = trainer.merged.model
        positions = torch.full((len(ids),), trainer.marker_position)
        with inference(merged), inject(merged, batch["vectors"], positions, trainer.layer):
            logits = merged(ids, logits_to_keep=width + 1).logits[:, :-1][real].float()
        logits[:, trainer.marker_id] = -torch.inf
        sampled = logits.log_softmax(-1).gather(1, batch["completion_ids"][real][:, None])[:, 0]
    pairs = {"prompt shared and not": shared - whole, "sampled from and trained": sampled - shared}
    return {
        f"{name}, {how}": float(of(d.abs()))
        for name, d in pairs.items()
        for how, of in (("largest", torch.max), ("mean", torch.mean))
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=("smollm2", "couplets"), default="smollm2")
    parser.add_argument("--weights", help="a folder with SmolLM2, in the place of the one that `make real` installs")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    settings = JointSettings(
        steps=options.rounds + 2, prompts_per_step=options.prompts, group_size=options.group_size, beta=0.02
    )
    nla = make_pair(options.shape, options.weights, options.dtype, options.tokens)
    vectors = torch.randn(N_VECTORS, nla.config.d_model, generator=torch.Generator().manual_seed(3))
    texts = [text_of(nla, options.tokens)] * N_VECTORS
    with tempfile.TemporaryDirectory() as folder, nla.role("encoder"), own_forward(nla):
        ours = our_trainer(nla, vectors, texts, settings, Path(folder))
        plain = plain_trainer(nla, vectors, texts, settings, Path(folder))
        sides: dict[str, tuple[Any, Phases]] = {"plain": (plain, timed_phases(plain)), "nla": (ours, ours.phases)}
        held = {
            "plain": weights_mb(plain.model, plain.reward_funcs[0].model),  # pyright: ignore
            "nla": weights_mb(nla.model, ours.merged.model if ours.merged else nla.model),
        }
        print(f"{options.shape}, {options.dtype}, {settings.rows} rollouts a step of at most {options.tokens} tokens,")
        print(f"prompt of {nla.prompt_ids.shape[1]} tokens, {torch.get_num_threads()} threads, {options.rounds} rounds")
        for trainer, _ in sides.values():
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = 1
        differences = log_prob_differences(ours, list(range(2)), options.group_size)
        spent: dict[str, list[float]] = {name: [] for name in sides}
        worked = dict.fromkeys(sides, 0.0)
        peaks: dict[str, list[float]] = {name: [] for name in sides}
        seconds: dict[str, dict[str, float]] = {name: dict.fromkeys(PHASES, 0.0) for name in sides}
        for number in range(options.rounds + 1):
            for name, (trainer, phases) in sides.items():
                first = number == 0  # a small step that warms up
                rows = list(range(2 if first else options.prompts))
                with contextlib.ExitStack() as stack:
                    stack.enter_context(peak_memory([] if first else peaks[name]))
                    started, at_work = time.perf_counter(), time.process_time()
                    step(trainer, phases, rows, options.group_size)
                taken = phases.take()
                if not first:
                    spent[name].append(time.perf_counter() - started)
                    worked[name] += (time.process_time() - at_work) / options.rounds
                    for phase in PHASES:
                        seconds[name][phase] += taken.get(phase, 0.0) / options.rounds
    report(nla, settings, options.tokens, spent, worked, peaks, held, seconds, differences)


def report(
    nla: NLA,
    s: JointSettings,
    n_tokens: int,
    spent: dict[str, list[float]],
    worked: dict[str, float],
    peaks: dict[str, list[float]],
    held: dict[str, float],
    seconds: dict[str, dict[str, float]],
    differences: dict[str, float],
) -> None:
    rates = {name: s.rows * len(each) / sum(each) for name, each in spent.items()}
    print("\n                    " + "".join(f"{name:>10s}" for name in rates))
    print("rollouts a second   " + "".join(f"{rate:10.2f}" for rate in rates.values()))
    print("CPU seconds a step  " + "".join(f"{worked[name]:10.1f}" for name in rates))
    print("weights, MB         " + "".join(f"{held[name]:10.0f}" for name in rates))
    print("a step's peak, MB   " + "".join(f"{max(peaks[name]):10.0f}" for name in rates))
    print("both, MB            " + "".join(f"{held[name] + max(peaks[name]):10.0f}" for name in rates))
    print(f"ratio of rates      {rates['nla'] / rates['plain']:20.2f}")
    print(f"ratio of CPU seconds{worked['plain'] / worked['nla']:20.2f}")
    rate, needed = matmul_rate(nla), floor(nla, s, n_tokens)
    print(f"\nseconds a step      {'plain':>10s}{'nla':>10s}{'share':>8s}{'floor':>8s}   (at {rate / 1e9:.0f} GFLOP/s)")
    whole = sum(seconds["nla"].values())
    for phase in PHASES:
        plain, ours = (seconds[name][phase] for name in ("plain", "nla"))
        print(f"{phase:20s}{plain:10.2f}{ours:10.2f}{ours / whole:8.0%}{needed[phase] / rate:8.2f}")
    print("\ndifferences of log-probabilities: " + "; ".join(f"{n} {d:.1e}" for n, d in differences.items()))


if __name__ == "__main__":
    main()
