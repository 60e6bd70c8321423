"""Floor 1: text, tokens, subject models and their residual streams. Useful with no dictionary."""
