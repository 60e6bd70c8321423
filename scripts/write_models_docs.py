"""Print what the probe says of tiny random models of many families into `docs/models.md`, under `Families`.

The list of families is this script's alone: the library knows no family by name.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import torch

from crosscoder.data.probe import probe_model
from crosscoder.foundation.artifact import replace_file

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
HEADING = "## Families"
WHOLE = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("n_heads", "num_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "vocab_size", "max_position_embeddings", "n_positions"), 64
    ),
    **dict.fromkeys(("max_seq_len", "max_position_embeddings", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "depth", "num_decoder_layers", "n_group"), 2),
    **dict.fromkeys(("topk_group", "bos_token_id"), 1),
    **dict.fromkeys(
        ("num_key_value_heads", "encoder_attention_heads", "decoder_attention_heads", "num_experts_per_tok"), 2
    ),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank", "d_kv"), 8),
    **dict.fromkeys(("rotary_dim", "mamba_d_state", "state_size", "mamba_dt_rank", "sliding_window", "window_size"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("image_size", "out_hidden_size", "embed_dim"), 32),
    "patch_size": 16,
    "qk_rope_head_dim": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8}
AS_THEY_ARE = """
gemma3 llava mllama qwen2_5_vl xglm xlm xlnet
"""
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in AS_THEY_ARE.split()},
    **{
        name: {}
        for name in [
            "afmoe",
            "albert",
            "apertus",
            "arcee",
            "bart",
            "bert",
            "biogpt",
            "bitnet",
            "bloom",
            "codegen",
            "cohere",
            "cohere2",
        ]
    },
    **{
        name: {}
        for name in [
            "cpmant",
            "ctrl",
            "cwm",
            "deepseek_v4",
            "diffllama",
            "electra",
            "ernie4_5",
            "ernie4_5_moe",
            "exaone4",
            "falcon",
        ]
    },
    **{
        name: {}
        for name in [
            "falcon_mamba",
            "flex_olmo",
            "funnel",
            "gemma",
            "gemma2",
            "gemma3_text",
            "glm",
            "glm4",
            "gpt2",
            "gpt_bigcode",
        ]
    },
    **{
        name: {}
        for name in ["gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoeshared", "helium", "hrm_text"]
    },
    **{
        name: {}
        for name in [
            "hunyuan_v1_moe",
            "jetmoe",
            "lfm2",
            "llama",
            "llama4_text",
            "mamba",
            "minimax",
            "mistral",
            "mixtral",
        ]
    },
    **{
        name: {}
        for name in [
            "modernbert-decoder",
            "mpt",
            "nanochat",
            "nemotron",
            "nemotron_h",
            "olmo",
            "olmo2",
            "olmo3",
            "olmo_hybrid",
            "olmoe",
        ]
    },
    **{
        name: {}
        for name in [
            "openai-gpt",
            "opt",
            "persimmon",
            "phi",
            "phi3",
            "phimoe",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
        ]
    },
    **{
        name: {}
        for name in [
            "recurrent_gemma",
            "roberta",
            "rwkv",
            "seed_oss",
            "smollm3",
            "stablelm",
            "starcoder2",
            "t5",
            "vaultgemma",
        ]
    },
    "bamba": {**HEADS, "attn_layer_indices": [1, 3]},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    "falcon_h1": {**HEADS, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 4,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [64] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**HEADS, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "adapter_rank": 8, "num_key_value_heads": 4},
}
PARTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
}


def tiny_config(kind: str, **settings: Any) -> Any:
    """A configuration of a family at width 32 and 2 to 4 layers; every size that it knows is made small."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    usual, taken = made(), inspect.signature(made.__init__).parameters
    small: dict[str, Any] = {}
    for name, size in WHOLE.items():
        if type(getattr(usual, name, None)) is int or name in taken:
            with contextlib.suppress(NotImplementedError, AttributeError):  # a size that follows from others
                setattr(usual, name, size)
                small[name] = size
    for name, part in made.sub_configs.items():
        kind_of_part = getattr(getattr(usual, name, None), "model_type", None) or part.model_type
        if name not in settings and kind_of_part:
            small[name] = tiny_config(kind_of_part, **PARTS.get(kind_of_part, {})).to_dict()
    return made(**{**small, **settings})


def tiny_model(kind: str, *, seed: int = 0) -> Any:
    """A random model of a family: of the first sort of class that `transformers` has for it."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )

    config = tiny_config(kind, **FAMILIES[kind])
    autos: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForMaskedLM]
    auto = next(auto for auto in autos if type(config) in auto._model_mapping)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config, dtype=torch.float32).eval()


def row(kind: str) -> str:
    """The family's line of the table."""
    model = tiny_model(kind)
    try:
        found = probe_model(model)
    except ValueError as error:
        return f"| {kind} | {type(model).__name__} | refused | {error} | |".replace("'", "`")
    # That there is no MLP to be read is said once for each kind of block, without every reason.
    mlp = "; ".join(part.split(" (--mlp-path")[0] for part in found.mlp.split("; "))
    said = "; ".join([*(["causal"] if found.causal else []), *found.notes])
    return f"| {kind} | {type(model).__name__} | `{found.path}`, {found.n_blocks} | {said} | {mlp} |"


def table() -> list[str]:
    """The whole table, a family a line in the order of their names."""
    return [row(kind) for kind in sorted(FAMILIES)]


def render(document: str) -> str:
    """The document with everything below its heading written from the probe's answers."""
    prose, _, _ = document.partition(f"{HEADING}\n")
    lines = [HEADING, "", "| family | model | blocks | said | MLPs |", "|---|---|---|---|---|", *table(), ""]
    return prose + "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    replace_file(DOCUMENT, render(DOCUMENT.read_text(encoding="utf-8")).encode("utf-8"))
