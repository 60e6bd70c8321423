"""Cross-layer dictionary learning on a language model's whole residual stream."""
