"""Floor 1: dictionaries as functions of `x_BLD`, wherever that came from."""

from pathlib import Path
from typing import Any

from crosscoder.dictionary import pretrained
from crosscoder.dictionary.crosscoder import Crosscoder
from crosscoder.dictionary.interface import (
    Dictionary,
    DictionaryConfig,
    DictionaryOutput,
    SparseCode,
)
from crosscoder.dictionary.layerwise import LayerwiseSAE
from crosscoder.dictionary.sparsity import (
    BatchTopK,
    JumpReLU,
    L0Penalty,
    NormPenalty,
    ReLU,
    Sparsity,
    TanhPenalty,
    TargetL0Penalty,
    TopK,
)
from crosscoder.dictionary.structure import (
    Acausal,
    Diffing,
    LocalWindow,
    StrictlyCausal,
    Structure,
    Transcoder,
    WeaklyCausal,
    stack_subjects,
)

DICTIONARIES: dict[str, Any] = {"Crosscoder": Crosscoder, "LayerwiseSAE": LayerwiseSAE}


def load_dictionary(folder: str | Path, *, verify: bool = True) -> Any:
    """The dictionary saved in `folder`, of whichever class its config names, in evaluation mode."""
    return pretrained.load_dictionary(folder, DICTIONARIES, verify=verify)


__all__ = [
    "DICTIONARIES",
    "Acausal",
    "BatchTopK",
    "Crosscoder",
    "Dictionary",
    "DictionaryConfig",
    "DictionaryOutput",
    "Diffing",
    "JumpReLU",
    "L0Penalty",
    "LayerwiseSAE",
    "LocalWindow",
    "NormPenalty",
    "ReLU",
    "SparseCode",
    "Sparsity",
    "StrictlyCausal",
    "Structure",
    "TanhPenalty",
    "TargetL0Penalty",
    "TopK",
    "Transcoder",
    "WeaklyCausal",
    "load_dictionary",
    "stack_subjects",
]
