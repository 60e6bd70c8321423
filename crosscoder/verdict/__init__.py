"""What the numbers mean: the rule, its evidence, its labels."""
