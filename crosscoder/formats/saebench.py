"""One layer of a bank in the shape that SAEBench evaluates: `W_enc`, `W_dec`, `encode`, `decode` and a `cfg`.

    from crosscoder.formats.saebench import SAEBenchSAE
    sae = SAEBenchSAE(bank, 0, model_name="gpt2-small")

It reads raw activations `[B, D]` or `[B, S, D]` of one hook; a crosscoder needs those of all its layers at once, which
SAEBench does not give, and is refused.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from crosscoder.dictionary import Dictionary, LayerwiseSAE
from crosscoder.formats.saelens import recorded, saelens_tensors

UNUSED: dict[str, Any] = {
    "hook_head_index": None,
    "context_size": None,
    "prepend_bos": None,
    "dataset_path": "",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "activation_fn_str": "",
    "activation_fn_kwargs": {},
    "finetuning_scaling_factor": False,
    "model_from_pretrained_kwargs": {},
    "dataset_trust_remote_code": False,
    "seqpos_slice": (None,),
    "training_tokens": -1,
    "sae_lens_training_version": None,
    "neuronpedia_id": None,
}
"""Settings that SAEBench wants to find, and that say nothing here unless the record does."""


class _Config(SimpleNamespace):
    """The settings that SAEBench looks up; it adds some of its own."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "metadata"}


class SAEBenchSAE(nn.Module):
    """A flat SAE on raw activations, by the formula of the file that `save_saelens` writes.

    layer: of the bank, counted from 0. model_name, hook_name: as TransformerLens calls them; what the dictionary's
        record says if left out.

    Raises:
        ValueError: the dictionary is no bank, has no such layer, or nobody says what it reads.
        MismatchError: it keeps no scale of its inputs, unless `raw_inputs`.
    """

    threshold: Tensor | None

    def __init__(
        self,
        bank: Dictionary,
        layer: int,
        *,
        model_name: str = "",
        hook_name: str = "",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        raw_inputs: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(bank, LayerwiseSAE):
            raise ValueError(
                f"a {type(bank).__name__} reads {bank.config.n_layers} layers at once, and SAEBench gives those of one "
                "hook; evaluate a LayerwiseSAE, or measure this with `crosscoder evaluate`"
            )
        bank.require_input_scale("SAEBench", raw_inputs=raw_inputs)
        settings, tensors = saelens_tensors(bank, layer)
        known = recorded(bank.reads, layer)
        model_name, hook_name = model_name or known.pop("model_name", ""), hook_name or known.pop("hook_name", "")
        if not model_name or not hook_name:
            raise ValueError("nobody says which model and hook this reads; give model_name and hook_name")
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = (
            nn.Parameter(tensors[name], requires_grad=False) for name in ("W_enc", "W_dec", "b_enc", "b_dec")
        )
        self.register_buffer("threshold", tensors.get("threshold"))
        self.k: int | None = settings.get("k")
        self.cfg = _Config(
            **{**UNUSED, **known},
            model_name=model_name,
            hook_name=hook_name,
            hook_layer=int(hook_name.split(".")[1]) if hook_name.startswith("blocks.") else 0,
            d_in=settings["d_in"],
            d_sae=settings["d_sae"],
            architecture=settings["architecture"],
        )
        self.to(device=device, dtype=dtype)

    def encode(self, x: Tensor) -> Tensor:
        """The code `[..., F]` of raw activations `[..., D]`."""
        score = (x.to(self.dtype) - self.b_dec) @ self.W_enc + self.b_enc
        if self.k is not None:
            values, features = score.topk(self.k, dim=-1)
            return torch.zeros_like(score).scatter(-1, features, values.relu())
        value = score.relu()
        return value if self.threshold is None else value * (score > self.threshold)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Raw activations `[..., D]` of a code."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> SAEBenchSAE:
        """As of any module; `device`, `dtype` and the `cfg` follow."""
        super().to(*args, **kwargs)
        self.device, self.dtype = self.W_enc.device, self.W_enc.dtype
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self
