"""Weights and tokenizer from a Hugging Face folder, a hub id, a .gguf file, or a folder of adapters."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import struct
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from truecourse.errors import UserError
from truecourse.model import attention
from truecourse.model.logprobs import head_of, seam_holds
from truecourse.recipe import Lora

SHIPPED = Path(__file__).parents[1] / "lab" / "tiny"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Nats by which packed log-probs may differ from the model's own forward; 0.25 in half precision."""


@dataclass
class Loaded:
    """A causal LM ready for the packed path, and what belongs to it."""

    model: Any
    tokenizer: Any
    end_ids: tuple[int, ...]
    """Ids that the model's generation config names as ends."""
    packed: bool
    """Whether the packed path gives the model's own numbers; if not, the padded one is used."""
    note: str = ""
    """What the user should know about how it was loaded."""


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to use. Raises `UserError` for cuda where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError('device = "cuda", but torch sees no CUDA GPU; use device = "auto" or "cpu"')
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def load(
    source: str,
    *,
    device: torch.device,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    lora: Lora | None = None,
) -> Loaded:
    """The model behind `source`, with fresh adapters if `lora` is given. Raises `UserError` naming what is wrong."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    number = torch.float32 if dtype == "float32" or (dtype == "auto" and device.type == "cpu") else torch.bfloat16
    path = SHIPPED if source == "tiny" else Path(source)
    adapter = path / "adapter_config.json" if path.is_dir() else None
    quantize = bool(lora and lora.quantize == "4bit")
    try:
        if adapter and adapter.is_file():
            model, tokenizer = _adapted(path, adapter, number)
        elif path.suffix == ".gguf":
            model, tokenizer = _gguf(path, number)
        else:
            model, tokenizer = _plain(source, path, number, quantize, device)
    except (OSError, ValueError, LookupError, struct.error) as error:  # the last two from a damaged .gguf file
        if isinstance(error, UserError):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model {source!r} could not be loaded: {first}") from error
    _silence_dropout(model)
    if not quantize:
        model.to(device)
    if lora:
        model = _with_adapters(model, lora)
    model.eval()
    ends = model.generation_config.eos_token_id if model.generation_config else None
    end_ids = tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),)
    packed, note = _prepare_seam(model, number)
    return Loaded(model, tokenizer, end_ids, packed, note)


def _plain(source: str, path: Path, number: torch.dtype, quantize: bool, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1
    if path.is_dir():
        _refuse_pickle(path)
    elif path.exists():
        raise UserError(f"model {source!r} is a file; give a Hugging Face folder or a .gguf file")
    elif looks_local and source != "tiny":
        raise UserError(
            f"model {source!r} does not exist; give a Hugging Face folder, a hub id (owner/name), or a .gguf file"
        )
    options: dict[str, Any] = {"dtype": number, "use_safetensors": True}
    if quantize:
        options |= _four_bit(device)
    name = str(path) if path.is_dir() else source
    return AutoModelForCausalLM.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name)


def _refuse_pickle(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {str(folder)!r} has no config.json, so it is not a Hugging Face model folder")
    _refuse_pickled(folder)


def _refuse_pickled(folder: Path) -> None:
    pickles = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model folder {str(folder)!r} holds only pickled weights ({pickles[0]}), which can run code when loaded; "
            "convert them to safetensors first (load them once in a sandbox and call save_pretrained)"
        )


def _four_bit(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        raise UserError('lora.quantize = "4bit" needs a CUDA GPU; leave it at "none" here')
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("lora.quantize = \"4bit\" needs bitsandbytes: pip install 'truecourse[qlora]'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _gguf(path: Path, number: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise UserError(f"model {str(path)!r} does not exist")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading a .gguf file needs the gguf package: pip install 'truecourse[gguf]'")
    options: dict[str, Any] = {"gguf_file": path.name}
    # transformers draws a bar while it converts, also into a log
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=number, **options)
    # transformers refuses to save a model that it read from gguf: the same weights in a fresh model can be saved
    config = loaded.config
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    for (name, buffer), (_, ours) in zip(loaded.named_buffers(), list(model.named_buffers())):
        owner, _, leaf = name.rpartition(".")
        if ours.is_meta:  # rotary frequencies are not in the state dict
            model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    model.generation_config = loaded.generation_config
    config.name_or_path = model.name_or_path = str(path)  # what an adapter's config names as its base
    return model, AutoTokenizer.from_pretrained(str(path.parent), **options)


def _adapted(path: Path, adapter: Path, number: torch.dtype) -> tuple[Any, Any]:
    """Adapters merged into the base that their config names."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _refuse_pickled(path)
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"adapter folder {str(path)!r} has no {weights.name}")
    base = json.loads(adapter.read_text())["base_model_name_or_path"]
    if Path(base).suffix == ".gguf":
        model, tokenizer = _gguf(Path(base), number)
    else:
        folder = SHIPPED if base == "tiny" else Path(base)
        name = str(folder) if folder.is_dir() else base
        model = AutoModelForCausalLM.from_pretrained(name, dtype=number, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(str(path) if (path / "tokenizer_config.json").is_file() else name)
    with _no_warning_of_pefts(), safe_open(weights, framework="pt") as file:
        adapted = PeftModel.from_pretrained(model, str(path))
        if other := set(get_peft_model_state_dict(adapted)) ^ set(file.keys()):  # peft takes what there is
            raise UserError(
                f"adapter folder {str(path)!r} does not fit its own config and the base {base!r}: {min(other)} is only "
                "in one of them"
            )
        merged = adapted.merge_and_unload()
    return merged.requires_grad_(True), tokenizer  # peft freezes the base


def _with_adapters(model: Any, lora: Lora) -> Any:
    """Freeze the model and put trainable adapters into it; returns the same causal LM, with `.peft` beside it."""
    import peft

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    if lora.quantize == "4bit":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        with _no_warning_of_pefts():
            wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise UserError(f"lora.targets = {lora.targets!r}: {error}") from None
    inner = wrapped.get_base_model()
    object.__setattr__(inner, "peft", wrapped)  # not a submodule: the wrapper holds the model, not the other way round
    return inner


@contextlib.contextmanager
def _no_warning_of_pefts() -> Iterator[None]:
    """peft reads an attribute by a name that transformers is giving up; a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _silence_dropout(model: nn.Module) -> None:
    """Sampler and trainer must be one policy: a model's own dropout is switched off (adapters set theirs later)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _prepare_seam(model: Any, number: torch.dtype) -> tuple[bool, str]:
    """Switch the model to our attention function where that gives its own numbers, and check that it does."""
    own = model.config._attn_implementation
    difference, reason = float("inf"), ""
    try:
        model.set_attn_implementation(attention.NAME)
        difference = seam_holds(model, head_of(model))
    except UserError:
        raise
    except (NotImplementedError, ValueError, AssertionError, AttributeError, TypeError, RuntimeError) as error:
        reason = f"{error}"
    if difference <= TOLERANCE.get(number, 0.25):
        return True, ""
    model.set_attn_implementation(own)
    reason = reason or f"packed log-probs differ from its own by {difference:.2g} nats"
    return (
        False,
        f"{type(model).__name__} runs on the padded path, which is slower and gives the same numbers ({reason})",
    )
