"""Adam for dictionaries: every parameter as rows of features, each row read and written once a step."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import triton_kernels
from crosscoder.dictionary.weights import OF_FEATURES, Weights


class RowAdam(torch.optim.Optimizer):
    """AdamW over a dictionary's parameters, fused with clipping and, for unit decoders, with keeping norms at 1.

    The state of each parameter is that of `torch.optim.Adam`: `step`, `exp_avg`, `exp_avg_sq`. The decoder of a
    dictionary with `decoder="unit"` first loses the part of its gradient along each row, which renormalising would undo
    (Bricken et al. 2023), and has rows of norm 1 again after the step.
    """

    def __init__(
        self,
        dictionary: Weights,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        keep_working_copy: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(dictionary.parameters(), defaults)
        for name, parameter in dictionary.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name} is {parameter.dtype}; dictionaries are trained in float32, where precision='bf16' rounds "
                    "what may be rounded: use dictionary.float()"
                )
        self._dictionary = dictionary
        self._unit = "decoder" if dictionary.config.decoder == "unit" else None
        self.sizes = [dictionary.n_held]
        """Features that exist, of each set of dictionaries in a `Stack`."""
        self.keep_working_copy = keep_working_copy
        self.working_RN: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # torch's own leaves out what a subclass adds, so that a copy could not go on

    @property
    def working_GFN(self) -> Tensor | None:
        """The encoder rounded to bf16 for the next product, from the first step on, where this optimiser keeps it."""
        if self.working_RN is None:
            return None
        return rearrange(self.working_RN, "(g f) n -> g f n", g=self._dictionary.n_groups)

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as rows: one a feature for encoder and decoder, one number each for biases; never a copy."""
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous: parameter.data.contiguous()")
        if name not in ("encoder", "decoder"):
            return tensor.view(-1, 1)
        return tensor.view(self._dictionary.n_groups * self._dictionary.n_held, -1)

    @torch.no_grad()
    def row_squares(self, *, untouched: bool = False) -> dict[str, Tensor]:
        """Squared norms of what the step would follow, by row of each parameter that has a gradient.

        untouched: as in `ops.row_squares`.
        """
        found = {}
        for name, parameter in self._dictionary.named_parameters():
            if parameter.grad is not None:
                unit = self._rows(name, parameter) if name == self._unit else None
                found[name] = triton_kernels.row_squares(
                    self._rows(name, parameter.grad.contiguous()), unit, untouched=untouched
                )
        return found

    @torch.no_grad()
    def gradient_norms(self, squares: dict[str, Tensor] | None = None, *, untouched: bool = False) -> Tensor:
        """Norm of what the step would follow, `[G]`, over all parameters of each dictionary of a bank by itself.

        squares: of the rows, where they are known (`row_squares`). untouched: as there.
        """
        n_sets, n_own = len(self.sizes), self._dictionary.n_groups // len(self.sizes)
        dtype = self._dictionary.decoder_bias.dtype
        found = [[self._dictionary.decoder_bias.new_zeros(n_own, dtype=torch.float64)] for _ in self.sizes]
        shard = self._dictionary.others
        for name, rows in (self.row_squares(untouched=untouched) if squares is None else squares).items():
            if shard is not None and name == "decoder_bias" and not shard.ranks.is_first:
                continue  # every rank has it, and it counts once
            for own, own_GR, size in zip(found, rows.view(n_sets, n_own, -1), self.sizes, strict=True):
                own.append((own_GR[:, :size] if name in OF_FEATURES else own_GR).sum(1, dtype=torch.float64))
        sums = [torch.stack(own).sum(0) for own in found]
        if shard is not None:
            shard.add_once(sums[0], "gradient norms")
        return (sums[0] if n_sets == 1 else torch.cat(sums)).sqrt().to(dtype)

    @torch.no_grad()
    def step(self, *, scale_G: Tensor | None = None) -> None:  # ty: ignore[incompatible-method-override]
        """One step; gradients are multiplied by `scale_G`, one number for each dictionary of a bank."""
        self.update(scale_G=scale_G)

    @torch.no_grad()
    def update(self, *, scale_G: Tensor | None = None) -> None:
        """`step` without torch's hooks, which cost a small dictionary more than its arithmetic."""
        settings = self.param_groups[0]
        for name, parameter in self._dictionary.named_parameters():
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            tensors = (parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
            triton_kernels.adam_rows(
                *(self._rows(name, tensor) for tensor in tensors),
                step=int(state["step"]),
                rate=settings["lr"],
                betas=settings["betas"],
                eps=settings["eps"],
                weight_decay=settings["weight_decay"],
                scale_G=scale_G,
                unit=name == self._unit,
                working_RN=self._working_copy(name, parameter),
            )

    @torch.no_grad()
    def replace_rows(self, features: Tensor, rows: dict[str, Tensor]) -> None:
        """Write new rows of the named parameters and forget their moments, as if they had never been trained.

        features: counted over all dictionaries of a bank. The count of steps is the whole parameter's and stays.
        """
        parameters = dict(self._dictionary.named_parameters())
        for name, new_RN in rows.items():
            parameter = parameters[name]
            self._rows(name, parameter)[features] = new_RN.to(parameter.dtype)
            for key in ("exp_avg", "exp_avg_sq"):
                if key in self.state[parameter]:
                    self._rows(name, self.state[parameter][key])[features] = 0
            working_RN = self._working_copy(name, parameter)
            if working_RN is not None:
                working_RN[features] = new_RN.to(working_RN.dtype)

    def _working_copy(self, name: str, parameter: Tensor) -> Tensor | None:
        if name != "encoder" or not self.keep_working_copy:
            return None
        if self.working_RN is None:
            self.working_RN = torch.empty_like(self._rows(name, parameter), dtype=torch.bfloat16)
        return self.working_RN
