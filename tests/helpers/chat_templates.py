"""Chat templates in the shape of each family's, and a tokenizer of characters that has the family's control tokens."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
_ALTERNATE = (
    "{% for m in chat %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}{% endfor %}"
)
_SYSTEM_APART = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set chat = messages[1:] %}"
    "{% else %}{% set system = none %}{% set chat = messages %}{% endif %}"
)


class Family(NamedTuple):
    """How a family writes chats."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    answer: str
    """What an answer begins after."""

    knows_system: bool = True
    trims: bool = False


FAMILIES = {
    "chatml": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        None,
        "<|im_end|>",
        "<|im_start|>assistant\n",
    ),
    "llama3": Family(
        "{% for m in messages %}{% set head = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' %}"
        "{{ (bos_token if loop.first else '') + head + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        trims=True,
    ),
    "mistral": Family(
        _SYSTEM_APART + _ALTERNATE + "{{ bos_token }}{% for m in chat %}{% if m.role == 'user' %}"
        "[INST] {{ system + '\n\n' if system and loop.first else '' }}{{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        " [/INST]",
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% set chat = messages %}"
        + _ALTERNATE
        + "{% for m in chat %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<start_of_turn>model\n",
        knows_system=False,
        trims=True,
    ),
    "phi3": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<s>"),
        None,
        "<|endoftext|>",
        "<|assistant|>\n",
    ),
    "olmo": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{{ '' if m.role == 'assistant' and loop.last else '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|endoftext|>", "<|pad|>"),
        "<|endoftext|>",
        "<|endoftext|>",
        "<|assistant|>\n",
    ),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A token a character and a token for each control token; it adds BOS to plain text, as the families' own do."""
    family = FAMILIES[name]
    vocabulary = {token: number for number, token in enumerate([*family.special, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=family.special[0]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    if family.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, vocabulary[family.bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}"
    "{% set r = m.reasoning_content if m.reasoning_content is defined else '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and r %}"
    "<think>\n{{ r.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}"
)
_EVERY_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content is defined and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
_CALLING = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
_PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SHAPES = {"thinking": _THINKING, "every thought": _EVERY_THOUGHT, "calling": _CALLING, "plain": _PLAIN}
"""What templates do with reasoning and tools: Qwen3's way (thinking since the last user message), always, calls and
tools written, nothing but contents."""


def tokenizer_in_shape(shape: str) -> PreTrainedTokenizerFast:
    """A tokenizer of characters whose template is one of ``SHAPES``."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = SHAPES[shape]
    return tokenizer
