"""Tiny random models of the architectures that the package is tested on, and a batch that exercises the packing."""

from typing import Any

import torch

from truecourse.data.sequences import Batch
from truecourse.model import attention
from truecourse.model.loading import Loaded

NAMES = ("llama", "qwen3", "gpt2", "mistral", "gemma2")
VOCABULARY = 64


def tiny(name: str, seed: int = 0) -> Any:
    """A random causal LM; its weights are scaled up so that distributions are far from uniform."""
    import transformers as t

    t.logging.set_verbosity_error()
    torch.manual_seed(seed)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    if name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**common))
    elif name == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**common, head_dim=16))
    elif name == "mistral":
        model = t.MistralForCausalLM(t.MistralConfig(**common, sliding_window=5))
    elif name == "gemma2":
        model = t.Gemma2ForCausalLM(
            t.Gemma2Config(**common, head_dim=16, sliding_window=5, query_pre_attn_scalar=16,
                           attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
        )  # fmt: skip
    else:
        model = t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0,
                         embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)
        )  # fmt: skip
    with torch.no_grad():
        for name_, p in model.named_parameters():
            if p.ndim == 2 and "norm" not in name_:
                p.mul_(4)
    return model.eval()


def loaded(model: Any, packed: bool = True) -> Loaded:
    model.set_attn_implementation(attention.NAME if packed else "eager")
    return Loaded(model, None, (), packed)


def ragged(seed: int = 0) -> Batch:
    """Four prompts of 1 to 23 tokens, 1 to 3 completions each, of 1 to 21 tokens."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n,), generator=draw).tolist()

    prompts = [tokens(n) for n in (3, 14, 1, 23)]
    owner = [0, 0, 0, 1, 2, 2, 3, 3]
    return Batch(prompts, [tokens(n) for n in (2, 5, 1, 21, 3, 8, 4, 9)], owner)


def naive_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies `[T]` by the model's own forward, one completion at a time."""
    logps, entropies = [], []
    for completion, owner in zip(batch.completions, batch.owner):
        row = torch.tensor([[*batch.prompts[owner], *completion]])
        logits = model(input_ids=row, use_cache=False).logits[0, len(batch.prompts[owner]) - 1 : -1].float()
        logp = (logits / temperature).log_softmax(-1)
        logps.append(logp.gather(1, torch.tensor(completion)[:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logps), torch.cat(entropies)
