"""What other tools' own code makes of what is exported for them: delphi's loader, and SAEBench's core evaluation.

    VENV/bin/python scripts/check_exports.py

VENV as for scripts/write_golden_formats.py, with sae-bench==0.6.0 (--no-deps) and this library. Ends with an error if a
number differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from check_common import peer

from crosscoder.dictionary import BatchTopK, LayerwiseSAE, TopK
from crosscoder.formats.activity import Activity
from crosscoder.formats.delphi import save_delphi
from crosscoder.formats.saebench import SAEBenchSAE

L, D, F = 2, 16, 40


def bank(rule: Any) -> LayerwiseSAE:
    """A bank with random weights and scales."""
    made = LayerwiseSAE(n_layers=L, d_model=D, n_features=F, sparsity=rule, decoder="free", seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        made.input_scale.copy_(torch.tensor([0.5, 3.0]))
        made.threshold.fill_(0.8)
    return made.eval()


def check_delphi(folder: Path) -> None:
    """Every latent's locations and activations, as delphi's `LatentDataset` gives them; one split has none at all."""
    config, loader = peer("delphi.config"), peer("delphi.latents.loader")
    generator = torch.Generator().manual_seed(0)
    latents = torch.relu(torch.randn(6, 32, F, generator=generator) - 1)
    latents[..., 8:16] = 0  # all of the second of five splits
    where = latents.nonzero()
    tokens = torch.randint(0, 50, (6, 32), generator=generator)
    columns = (column.int().numpy() for column in where.unbind(1))
    read = torch.ones(tokens.shape, dtype=torch.bool)
    activity = Activity("layers.4", F, tokens, read, *columns, latents[tuple(where.T)].numpy())
    save_delphi(activity, folder / "latents", model_name="tiny")

    class Tokenizer:
        """Stands where delphi wants a tokenizer; loading asks nothing of it."""

    dataset = loader.LatentDataset(
        folder / "latents",
        config.SamplerConfig(),
        config.ConstructorConfig(),
        tokenizer=Tokenizer(),
        modules=["layers.4"],
    )
    found = torch.zeros_like(latents)
    for buffer in dataset.buffers:
        for data in buffer:
            location = data.activation_data.locations
            found[tuple(location.T)] = data.activation_data.activations.float()
    assert torch.equal(dataset.tokens, tokens)
    assert torch.equal(found > 0, latents > 0)
    torch.testing.assert_close(found, latents, rtol=1e-3, atol=1e-6)
    print(f"delphi: {len(where):,} activations of {F} latents in {len(dataset.buffers)} files are read as they are")


def check_saebench() -> None:
    """Codes and reconstructions through SAEBench's own checks of a custom SAE, and its standard form of settings."""
    general, base = peer("sae_bench.sae_bench_utils.general_utils"), peer("sae_bench.custom_saes.base_sae")
    x_BSD = torch.randn(4, 8, D, generator=torch.Generator().manual_seed(3))
    for rule in (TopK(k=4), BatchTopK(k=4)):
        made = bank(rule)
        sae = SAEBenchSAE(made, 1, model_name="tiny", hook_name="blocks.3.hook_resid_post")
        general._standardize_sae_cfg(sae.cfg)
        wanted = {name for name in vars(base.sae_config.CustomSAEConfig) if not name.startswith("_")}
        missing = wanted - {*vars(sae.cfg), "to_dict", "device", "dtype"}
        assert not missing, missing
        assert sae.cfg.to_dict()["hook_layer"] == 3
        with torch.no_grad():
            out = made(torch.stack([x_BSD, x_BSD], dim=2) * made.input_scale[:, None])
            recon = (out.recon / made.input_scale[:, None])[..., 1, :]
            code, found = sae.encode(x_BSD), sae(x_BSD)
        error = float((found - recon).abs().max() / recon.abs().max())
        active = np.array_equal((code > 0).numpy(), (out.code.to_dense()[..., 1, :] > 0).numpy())
        assert error < 1e-5, error
        assert active
        print(f"SAEBench, {type(rule).__name__}: relative difference of reconstructions {error:.1e}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        check_delphi(Path(folder))
    check_saebench()
    sys.exit(0)
