"""Floor 3: finished dictionaries and activations in, plain values and pictures out.

What a dictionary does: features (activity, layer profiles), splice (what the subject loses), spread with probes and
probe_passes (what features are read from), shrinkage (what a penalty does to sizes), recovery and detection (scores
against planted truth), reading (all that a comparison needs of it, in one file).

What readings say together: matching, counting, saturation, seeds, capacity, geometry, density, gain, universality,
cross_layer; statistics holds bootstrap and equivalence. comparison measures a site; evidence gathers what the rule
reads; rule, conditions and verdict decide.

How it is shown: schema of specs; tables, spread_tables, verdict_tables; panels, figures, model_figures,
verdict_figures; report. published and published_rules stand other people's numbers beside ours.
"""
