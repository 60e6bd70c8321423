"""Cross-layer dictionary learning on a language model's whole residual stream.

Dimension letters, used as suffixes of tensor names everywhere (`x_BLD`, `values_P`, `decoder_FLD`):

    B  tokens in a batch, flattened        F  features in a dictionary
    S  position in a sequence              K  active features kept per token
    L  layers (residual sites) together    P  active (token, feature) pairs in a batch
    D  residual width of one layer         N  flattened payload, L * D
    G  dictionaries side by side           R  rows of a sparse code
"""

from crosscoder.dictionary import (
    BatchTopK,
    Crosscoder,
    JumpReLU,
    LayerwiseSAE,
    ReLU,
    SparseCode,
    TopK,
    load_dictionary,
)

__version__ = "0.2.0"
__all__ = ["BatchTopK", "Crosscoder", "JumpReLU", "LayerwiseSAE", "ReLU", "SparseCode", "TopK", "load_dictionary"]
