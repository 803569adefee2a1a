"""The shipped tiny model: a Llama of 0.12 M parameters over bytes, fine-tuned on the task `lab:sums-demos`.

Its folder is a plain Hugging Face one. `python -m truecourse.lab.build` makes it again from nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("this model knows the roles system, user and assistant, not " + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def path() -> Path:
    """The folder of the shipped model."""
    return Path(__file__).parent / "tiny"


def tokenizer() -> Any:
    """One token for each byte of UTF-8, so that no text is unknown to it, and six special ones.

    Plain text gets `<|bos|>` in front. A turn ends with `<|end|>`, which is also the end-of-sequence token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", vocab["<|bos|>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


CONTEXT = 512


def new_model(seed: int) -> Any:
    """A Llama with random weights drawn from `seed`: width 64, 2 layers, 4 heads, tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_new(folder: str | Path, seed: int) -> None:
    """Write a fresh model and its tokenizer to `folder`, as Hugging Face's `save_pretrained` does."""
    new_model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
