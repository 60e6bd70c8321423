"""Floor 3: finished dictionaries and activations in, plain values and pictures out.

features: activity, layer profiles, spread (functional spread belongs here too). matching: similarities and pairing
rules (universality between subjects builds on them). counting: alive, distinct, merged, recaptured. capacity:
neurons, slots, effective dimension (geometry grows here). splice: what the subject loses. schema, tables, figures,
panels, report: the results value and how it is shown. A verdict, when there is one, reads values alone.
"""
