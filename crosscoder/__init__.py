"""Cross-layer dictionary learning on a language model's whole residual stream.

Dimension letters, used as suffixes of tensor names everywhere (`x_BLD`, `values_P`, `decoder_FLD`):

    B  tokens in a batch, flattened        F  features in a dictionary
    S  position in a sequence              K  active features kept per token
    L  layers (residual sites) together    P  active (token, feature) pairs in a batch
    D  residual width of one layer         N  flattened payload, L * D
    G  dictionaries side by side           R  rows of a sparse code
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosscoder.data.subject import load_model
    from crosscoder.dictionary import (
        Acausal,
        BatchTopK,
        Crosscoder,
        Dictionary,
        DictionaryConfig,
        Diffing,
        JumpReLU,
        LayerwiseSAE,
        LocalWindow,
        ModelCard,
        ReLU,
        SparseCode,
        StrictlyCausal,
        TopK,
        Transcoder,
        WeaklyCausal,
        load_dictionary,
        stack_subjects,
    )
    from crosscoder.interventions import ablate, steer
    from crosscoder.results.evaluation import Evaluation
    from crosscoder.results.file import load_results
    from crosscoder.training import TrainConfig, TrainResult, train, train_many, train_warm_chain

__version__ = "0.2.0"
_HOMES = {
    "crosscoder.training": ("TrainConfig", "TrainResult", "train", "train_many", "train_warm_chain"),
    "crosscoder.interventions": ("ablate", "steer"),
    "crosscoder.data.subject": ("load_model",),
    "crosscoder.results.evaluation": ("Evaluation",),
    "crosscoder.results.file": ("load_results",),
}
"""Where names are that are not in `crosscoder.dictionary`."""
__all__ = [
    "Acausal",
    "BatchTopK",
    "Crosscoder",
    "Dictionary",
    "DictionaryConfig",
    "Diffing",
    "Evaluation",
    "JumpReLU",
    "LayerwiseSAE",
    "LocalWindow",
    "ModelCard",
    "ReLU",
    "SparseCode",
    "StrictlyCausal",
    "TopK",
    "TrainConfig",
    "TrainResult",
    "Transcoder",
    "WeaklyCausal",
    "ablate",
    "load_dictionary",
    "load_model",
    "load_results",
    "stack_subjects",
    "steer",
    "train",
    "train_many",
    "train_warm_chain",
]


def __getattr__(name: str) -> Any:
    """Torch is loaded with the first thing that needs it: the command watches for signals before that."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "crosscoder.dictionary")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
