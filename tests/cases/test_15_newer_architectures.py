"""Case 15: targets of types that no list names are read rightly, or refused with what differed.

The oracle is transformers: its own hidden states, and its own forward pass on embeddings in which the vector stands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from nla.autoencoder import NLA
from nla.errors import ArchitectureError, ContextLengthError
from nla.models.generate import generate
from nla.models.hooks import inject, replace
from nla.models.load import load_target, load_truncated
from nla.models.long_text import read_ids
from nla.models.points import TESTED, block, layout
from nla.models.read import read
from nla.models.selfcheck import check_stream
from tests.helpers.tiny import CONTEXT, D_MODEL, N_BLOCKS, TEXTS, make_config, make_model, make_tokenizer

IDS = torch.tensor([[11, 33, 37, 40, 12, 20, 21, 30, 31, 33]])
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LINEAR = dict(zip(("linear_num_key_heads", "linear_num_value_heads"), (2, 4), strict=True))
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
PER_LAYER = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "sliding_window": 5}
PER_LAYER |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
RANKS = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
CHUNKED = {"attention_chunk_size": 32, "layer_types": ["chunked_attention", "full_attention"] * 2}
NEW: dict[str, dict[str, Any]] = {
    "qwen3_next": LINEAR | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "gemma4_text": PER_LAYER | {"num_kv_shared_layers": 1, "global_head_dim": 8},
    "glm4": {},
    "deepseek_v3": RANKS | EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    "llama4_text": CHUNKED | {"num_local_experts": 4, "intermediate_size_mlp": 48, "num_experts_per_tok": 1},
    "granite": {"logits_scaling": 0.25, "embedding_multiplier": 12.0},
    "cohere2": {"sliding_window": 5},
    "nemotron": {},
    "smollm3": {},
    "falcon_h1": MAMBA | {"mamba_chunk_size": 16, "embedding_multiplier": 5.0},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 8},
}
"""What the config of each type needs beside the usual."""
PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
IN_ONE: dict[str, dict[str, Any]] = {
    "jamba": PERIODS | {"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2, "use_mamba_kernels": False},
    "bamba": MAMBA | {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "minimax": {"block_size": 4},
}
"""Types that use their state for single tokens alone, or have a cache of their own kind."""


def new_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a type that ``TESTED`` does not name."""
    sizes = {"vocab_size": 64, "hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": N_BLOCKS}
    if "mamba" not in kind:
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": False}
    config = CONFIG_MAPPING[kind](
        **{**sizes, **tokens, "initializer_range": 0.25, **(NEW | IN_ONE).get(kind, {}), **changes}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def oracle(model: PreTrainedModel, ids: torch.Tensor, layer: int) -> torch.Tensor:
    first = 0 if "mamba" in model.config.model_type else 1  # what Mamba's list lacks are the embeddings
    return model(ids, output_hidden_states=True, use_cache=False).hidden_states[layer + first][0]


@pytest.mark.parametrize("kind", NEW)
def test_a_newer_type_is_read_and_loaded_as_transformers_has_it(kind: str, tmp_path: Path) -> None:
    model, tokenizer = new_model(kind), make_tokenizer()
    assert kind not in TESTED
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_target(tmp_path, device="cpu")
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)
    for layer in range(N_BLOCKS - 1):
        expected = torch.cat([oracle(model, torch.tensor([tokenizer(text)["input_ids"]]), layer) for text in TEXTS])
        views = model, load_truncated(tmp_path, f"resid_post.{layer}", device="cpu")
        for view in views:
            vectors = read(view, tokenizer, TEXTS, f"resid_post.{layer}").vectors
            assert ((vectors - expected).norm(dim=1) <= 1e-4 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("kind", NEW)
def test_a_long_row_is_read_part_after_part_as_in_one_pass(kind: str) -> None:
    model = new_model(kind)
    ids = torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(0))
    expected = oracle(model, ids[None], 2)
    vectors = read_ids(model, ids, "resid_post.2", range(40), chunk=16)
    assert ((vectors - expected).norm(dim=1) <= 1e-3 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("kind", IN_ONE)
def test_what_gives_other_values_in_parts_is_read_in_one_pass_or_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(kind)
    ids = torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(0))
    expected = oracle(model, ids[None], 2)
    vectors = read_ids(model, ids, "resid_post.2", range(40), chunk=16)
    assert ((vectors - expected).norm(dim=1) <= 1e-4 * expected.norm(dim=1)).all()
    monkeypatch.setattr("nla.models.long_text.MASK_ELEMENTS", 39**2)
    with pytest.raises(ContextLengthError, match=rf"at most 39.*{kind}.*in parts.*--window"):
        read_ids(model, ids, "resid_post.2", range(40), chunk=16)


@pytest.mark.parametrize("kind", [*NEW, "gemma", "opt"])
def test_an_injected_vector_enters_the_first_block_as_it_is(kind: str) -> None:
    model, vectors, entering = new_model(kind), torch.randn(2, D_MODEL), []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])

    with torch.no_grad(), inject(model, vectors, torch.tensor([3, 4])):
        block(model, "resid_post.0").register_forward_pre_hook(keep, with_kwargs=True)
        model(IDS.repeat(2, 1), use_cache=False)
    positions = model.model.decoder.embed_positions.weight[[5, 6]] if kind == "opt" else 0  # OPT's begin at 2
    assert torch.allclose(entering[0][[0, 1], [3, 4]], vectors + positions, rtol=1e-3, atol=1e-4)


def test_models_whose_embeddings_do_not_enter_as_they_are_or_that_read_their_padding_are_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"bloom.*more of an embedding than its length"):
        check_stream(new_model("bloom"))
    model = new_model("recurrent_gemma", lru_width=32, attention_window_size=16)
    with pytest.raises(ArchitectureError, match=r"recurrent_gemma.*padding on the left changes"):
        check_stream(model)


@pytest.mark.parametrize("kind", [*NEW, *IN_ONE])
def test_an_intervention_on_the_prompt_acts_once_while_answers_are_written(kind: str) -> None:
    """One token of an answer is all that follows of the prompt: greedy, it is what whole passes give."""
    model, vectors = new_model(kind), torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(0))
    for n_prompt in (1, 5):
        ids = IDS[:, :n_prompt]

        def changed() -> Any:
            return replace(model, "resid_post.1", [n_prompt - 1], 5 * vectors)  # noqa: B023

        settings: dict[str, Any] = {"ends": [], "pad": 0, "max_new_tokens": 4}
        written = generate(model, ids.tolist(), intervene=lambda rows, padding: changed(), **settings).ids
        whole = ids
        for _ in range(4):
            with torch.no_grad(), changed():
                logits = model(whole, use_cache=False).logits
            whole = torch.cat([whole, logits[:, -1:].argmax(dim=-1)], dim=1)
        assert written.tolist() == whole[:, n_prompt:].tolist()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_tokens_that_were_never_trained_do_not_make_a_model_refused(value: float) -> None:
    model = new_model("smollm3")
    with torch.no_grad():
        model.get_input_embeddings().weight[:40] = value  # all zero, or all equal
    check_stream(model)


@pytest.mark.parametrize("kind", NEW)
def test_a_pair_on_a_newer_type_explains_and_reconstructs(kind: str) -> None:
    model, tokenizer = new_model(kind), make_tokenizer()
    pair = NLA.create(model, tokenizer, make_config(tokenizer, model), rank=2)
    acts = pair.read(TEXTS[:2], positions="last")
    notes = pair.explain(acts, samples=2)
    assert pair.reconstruct(notes).shape == acts.vectors.shape
    alone = pair.encoder.generate(acts.vectors[:1], samples=1, greedy=True).texts
    assert pair.encoder.generate(acts.vectors, samples=1, greedy=True).texts[:1] == alone


def test_gemma_3n_whose_blocks_pass_on_several_streams_is_refused() -> None:
    changes = PER_LAYER | {"num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 4}
    changes |= {"activation_sparsity_pattern": [0.0] * N_BLOCKS, "intermediate_size": [48] * N_BLOCKS}
    model = new_model("gemma3n_text", **changes)
    with pytest.raises(ArchitectureError, match=r"gemma3n_text.*resid_post\.0 has the shape \(2, 2, 6, 32\)"):
        check_stream(model)
    with pytest.raises(ArchitectureError, match="shape"):
        read(model, make_tokenizer(), TEXTS, "resid_post.1")


def _mean_of_all(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + output.mean(dim=1, keepdim=True)


def _first_row_for_all(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 0.5 * output[:1]


def _more_if_alone(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1 if output.shape[1] == 1 else output


@pytest.mark.parametrize(
    ("broken", "differed"),
    [
        (lambda model: block(model, "resid_post.1").register_forward_hook(_more_if_alone), "a token that comes alone"),
        (lambda model: block(model, "resid_post.1").register_forward_hook(_mean_of_all), "changes what stands before"),
        (lambda model: block(model, "resid_post.0").register_forward_hook(_first_row_for_all), "another row"),
        (lambda model: model.model.norm.register_forward_hook(_mean_of_all), None),
        (lambda model: setattr(model.model, "norm", nn.LayerNorm(D_MODEL, elementwise_affine=False)), None),
        (lambda model: setattr(model.model, "embed_tokens", nn.Embedding(64, 16)), "fails"),
    ],
    ids=["other steps", "not causal", "rows mixed", "a norm that mixes", "another norm", "another width"],
)
def test_what_differs_is_said(broken: Any, differed: str | None) -> None:
    model = new_model("smollm3")
    broken(model)
    if differed is None:
        check_stream(model)  # above the last point: no activation depends on it
        return
    with pytest.raises(ArchitectureError, match=f"smollm3.*{differed}"):
        check_stream(model)


def test_blocks_and_norm_are_found_under_whatever_name() -> None:
    names = {kind: layout(new_model(kind).get_decoder()) for kind in ("falcon_h1", "granite")}
    assert names["falcon_h1"] == ("layers", "final_layernorm") and names["granite"] == ("layers", "norm")
    assert layout(make_model("gpt2").get_decoder()) == ("h", "ln_f")
