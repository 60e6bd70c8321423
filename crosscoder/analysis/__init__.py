"""Floor 3: finished dictionaries and activations in, plain values and pictures out.

features: activity, layer profiles. spread: decoder, functional, joint decodability; probes, probe_passes: the same
measured on a dictionary; cross_layer: X with its interval. matching: similarities and pairing rules; universality:
between subjects. counting: alive, distinct, merged, recaptured; saturation: towards a dictionary without end. capacity,
geometry: neurons, slots, effective dimension, interference, exponents. statistics: bootstrap and equivalence. recovery:
scores against planted truth. verdict: the preregistered rule, from values alone. splice: what the subject loses;
shrinkage: what a penalty does to sizes. schema, tables, figures, panels, report: the results value and how it is shown;
the studies' reports do not show what statistics, geometry, saturation, universality, spread and verdict compute yet.
"""
