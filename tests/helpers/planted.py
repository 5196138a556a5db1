"""A target whose plan is planted by hand, so that what the suite must find is known without any training."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from nla.autoencoder import NLA
from nla.config import InjectionConfig, NLAConfig, tokenizer_hash
from nla.eval.target import Target
from nla.metrics import Baseline
from nla.models.points import Point
from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.organisms.couplets import world
from nla.text.tokens import render_prompt

POINT, N_BLOCKS, D_MODEL, SCALE = "resid_post.1", 3, 96, 10.0
CODE = (*world.PLANS, *world.SEASONS, *world.NAMES)


def code(*words: str) -> Tensor:
    """The direction (d,) that stands for these words together."""
    vector = torch.zeros(D_MODEL)
    vector[[CODE.index(word) for word in words]] = SCALE
    return vector


def plan_of(line1: str) -> str | None:
    """The plan of a first line, by the rule of the world alone; None if it is not one."""
    words = re.findall(r"\w+", line1)
    colours, things = ([word for word in words if word in pool] for pool in (world.COLOURS, world.THINGS))
    if not (colours and things and words[-1] in world.FAMILY_OF):
        return None
    return world.plan_word(world.FAMILY_OF[words[-1]], colours[0], things[0])


class Planted(Qwen2ForCausalLM):
    """Writes at the newline of block 1 a code of plan, season and person. The continuation is that of the plan found
    there by block 2 (``used``), or else that of the text itself (decodable, unused)."""

    def __init__(self, config: Qwen2Config, tokenizer, used: bool) -> None:
        super().__init__(config)
        self.tokenizer, self.used = tokenizer, used
        self.newline = tokenizer.convert_tokens_to_ids("\n")
        self.model.embed_tokens.register_forward_pre_hook(self._see)
        self.model.layers[1].register_forward_hook(self._plant)
        self.model.layers[2].register_forward_pre_hook(self._find)

    def _see(self, module, args) -> None:
        if args[0].shape[1] > 1:
            self.rows = args[0].tolist()
            self.columns = [row.index(self.newline) if self.newline in row else None for row in self.rows]

    def _plant(self, module, args, output: Tensor) -> Tensor:
        if output.shape[1] > 1:
            output = output.clone()
            for number, column in enumerate(self.columns):
                if column is not None:
                    line = self.tokenizer.decode(self.rows[number][:column])
                    if (plan := plan_of(line)) is None:
                        continue
                    seen = [word for word in re.findall(r"\w+", line) if word in world.SEASONS + world.NAMES]
                    output[number, column] = code(plan, *seen)
        return output

    def _find(self, module, args) -> None:
        if args[0].shape[1] > 1:
            self.plans: list[str | None] = []
            for number, column in enumerate(self.columns):
                if column is None:
                    self.plans.append(None)
                elif self.used:
                    self.plans.append(world.PLANS[int(args[0][number, column, : len(world.PLANS)].argmax())])
                else:
                    self.plans.append(plan_of(self.tokenizer.decode(self.rows[number][:column])))

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if not len(self.model.layers):  # a lens asks the head alone, where nothing is planted
            return out
        width = out.logits.shape[1]
        total = len(self.rows[0]) if out.past_key_values is None else out.past_key_values.get_seq_length()
        for number, (column, plan) in enumerate(zip(self.columns, self.plans, strict=True)):
            if column is None or plan is None:
                continue
            line = self.tokenizer(world.second_line(plan))["input_ids"]
            for place in range(width):
                ahead = total - width + place - column
                if 0 <= ahead < len(line):
                    out.logits[number, place] = 0.0
                    out.logits[number, place, line[ahead]] = 20.0
        return out


def planted_model(used: bool = True) -> Planted:
    tokenizer = couplets_tokenizer.build()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Planted(config, tokenizer, used).eval()


def planted_target(used: bool = True) -> Target:
    model = planted_model(used)
    return Target(model, model.tokenizer, Point.parse(POINT))


def planted_pair(max_new_tokens: int = 6) -> NLA:
    """An untrained pair on the planted target: for what the suite does, not for what it finds."""
    model = planted_model()
    tokenizer, prompt = model.tokenizer, couplets_tokenizer.ENCODER_PROMPT
    ids, marker = render_prompt(tokenizer, prompt), tokenizer.convert_tokens_to_ids(couplets_tokenizer.MARKER)
    where = ids.index(marker)
    config = NLAConfig(
        target="planted",
        tokenizer_hash=tokenizer_hash(tokenizer),
        d_model=D_MODEL,
        dtype="float32",
        point=POINT,
        injection=InjectionConfig(
            marker=couplets_tokenizer.MARKER,
            marker_id=marker,
            left_id=ids[where - 1],
            right_id=ids[where + 1],
            norm=4.0,
        ),
        encoder_prompt=prompt,
        decoder_template=couplets_tokenizer.DECODER_TEMPLATE,
        max_new_tokens=max_new_tokens,
        activation_norm=20.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pair = NLA.create(model, tokenizer, config, rank=2)
        names = ("global", "line 1", "newline", "line 2", "line 3")
        pair.baselines = {name: Baseline.fit(torch.randn(16, D_MODEL)) for name in names}
    return pair


def read_code(vectors: Tensor) -> list[str]:
    """What the planted code says: the explanation that a perfect reader of activations gives."""
    n_plans, n_seasons = len(world.PLANS), len(world.SEASONS)
    texts = []
    for vector in vectors:
        plan = world.PLANS[int(vector[:n_plans].argmax())]
        season = world.SEASONS[int(vector[n_plans : n_plans + n_seasons].argmax())]
        name = world.NAMES[int(vector[n_plans + n_seasons : len(CODE)].argmax())]
        texts.append(f"It is {season}. {name} is here. The next line ends with {plan}. The last mark is a line break.")
    return texts


def write_code(texts: list[str]) -> Tensor:
    """The vectors that explanations describe, (n, d): a perfect decoder."""
    return torch.stack([code(*[word for word in re.findall(r"\w+", text) if word in CODE]) for text in texts])
