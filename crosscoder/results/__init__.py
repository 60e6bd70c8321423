"""Results as values: what they are called and how they are kept."""
