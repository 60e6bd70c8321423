"""Numbers computed from what dictionaries do on a text, without any judgement."""
