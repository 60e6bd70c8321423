"""Floor 4: whole studies: which subjects, which dictionaries, which counts."""
