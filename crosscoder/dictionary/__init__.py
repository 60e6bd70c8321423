"""Floor 1: dictionaries as functions of `x_BLD`, wherever that came from."""

from crosscoder.dictionary.card import ModelCard
from crosscoder.dictionary.codec import DictionaryOutput, SparseCode
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.dictionary import DICTIONARIES, Crosscoder, Dictionary, LayerwiseSAE
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

load_dictionary = Dictionary.from_pretrained

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
    "ModelCard",
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
