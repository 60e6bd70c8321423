"""Floor 0: files, configs and consoles. Knows nothing of models, dictionaries or features."""
