"""Floor 1: text, tokens, subjects, residual streams and their stores; useful with no dictionary at all."""
