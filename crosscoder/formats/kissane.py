"""Model-diffing crosscoders of ckkissane's replication (Kissane et al. 2024), and others saved in the same form.

    relu(sum over models of x_m @ W_enc[m] + b_enc), @ W_dec[:, m] + b_dec[m]

The factors that normalised each model's activations are not in the files: `--scale` gives them.
"""

from __future__ import annotations

from pathlib import Path

from crosscoder.dictionary import Crosscoder, Diffing, ReLU
from crosscoder.formats.foreign import open_tensors, read_settings
from crosscoder.formats.imported import About, assemble, uncentred_bias
from crosscoder.foundation.artifact import DamagedArtifactError

CONFIG, WEIGHTS = "cfg.json", "cc_weights.pt"
OF_TRAINING = (
    *("seed", "batch_size", "buffer_mult", "lr", "num_tokens", "l1_coeff", "beta1", "beta2", "dec_init_norm", "device"),
    *("model_batch_size", "log_every", "save_every", "seq_len", "site", "layer", "wandb_project", "wandb_entity"),
    *("enc_dtype", "model_name", "dataset", "buffer_size", "buffer_batches", "log_interval", "save_interval"),
)


def weights_file(folder: Path) -> Path:
    """The file of weights: safetensors where it was written again, or the pickle of the original."""
    again = (folder / WEIGHTS).with_suffix(".safetensors")
    return again if again.is_file() else folder / WEIGHTS


def read(folder: Path, *, allow_pickle: bool = False) -> Crosscoder:
    """The crosscoder of a folder with `cfg.json` and `cc_weights.pt`, its models stacked on the layer axis."""
    settings = read_settings(folder / CONFIG)
    width, n_features = settings.count("d_in"), settings.count("dict_size")
    hook, model = settings.take("hook_point", str, ""), settings.take("model_name", str, "")
    said = settings.take("n_models", int, None)
    settings.ignore(*OF_TRAINING)
    settings.finish()
    with open_tensors(weights_file(folder), allow_pickle=allow_pickle) as held:
        n_models = held.shape("W_enc", 3)[0]
        if said not in (None, n_models):
            raise DamagedArtifactError(f"{settings.where}: n_models is {said}, the file holds {n_models}")
        encoder = held.take("W_enc", n_models, width, n_features).permute(2, 0, 1).contiguous()
        bias_F, bias_LD = held.take("b_enc", n_features), held.take("b_dec", n_models, width)
        tensors = {
            "encoder": encoder,
            "decoder": held.take("W_dec", n_features, n_models, width),
            "encoder_bias": uncentred_bias(bias_F, encoder.flatten(1), bias_LD.flatten()),
            "decoder_bias": bias_LD,
        }
    structure = Diffing((1,) * n_models, (width,) * n_models)
    given = {"n_layers": n_models, "d_model": width, "n_features": n_features, "sparsity": ReLU()}
    about = About(model=model, convention=f"{hook or 'one place'} of {n_models} models")
    return assemble(Crosscoder, {**given, "structure": structure}, tensors, about.reads(n_models))
