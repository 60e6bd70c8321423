"""Whole studies: what is trained, measured and judged, in which order."""
