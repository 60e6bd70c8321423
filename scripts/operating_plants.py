"""The plants whose operating points are measured: what each is, and which labels are right or safe for it."""

from __future__ import annotations

from operating_worlds import Plant

NO_CONCLUSION = ("undecided", "not testable")
LOAD, FEATURES = "premise fails: load", "premise fails: features"
FEWER = (LOAD, FEATURES)
"""Either is right where B has fewer features than A: A's others are not among B's."""
CROWDED = (1.0, 10.0)
"""Features a neuron and active ones: B is so crowded that its dictionaries lose much whatever their k."""

PLANTS: tuple[Plant, ...] = (
    Plant(name="H0", right=("H0",), trainings=5),
    Plant(name="H0, 8 a neuron", right=("H0",), density=8.0, active=20.0, trained_as="H0"),
    Plant(name="H1a", right=("H1a",), gamma=0.5, trainings=5),
    Plant(name="H1b, 2 a neuron", right=("H1b",), code="words", density=2.0, active=5.0, trainings=2),
    Plant(name="H1b, 4 a neuron", right=("H1b",), code="words", trained_as="H1b, 2 a neuron"),
    Plant(name="H1b, 4, more active", right=("H1b",), code="words", active=40.0, trained_as="H1b, 2 a neuron"),
    Plant(name="over", right=("H2: over",), gamma=1.0, k_more=(6, 12, 24)),
    Plant(name="over, sparser", right=("H2: over",), gamma=1.0, instruments=(0.5, 2.0), k_factor=0.67, trainings=3),
    Plant(name="partial", right=("H2: partial",), gamma=0.25, delta=0.9, trainings=3),
    Plant(name="partial, lasting more", right=("H2: partial",), gamma=0.3, delta=0.9, trainings=3),
    Plant(name="load .5, delta 1", right=FEWER, load_ratio=0.5, trainings=3),
    Plant(name="load .5, delta .5", right=FEWER, load_ratio=0.5, crowding=0.5, trained_as="load .5, delta 1"),
    Plant(name="load .7, delta 1", right=FEWER, load_ratio=0.7, trained_as="load .5, delta 1"),
    Plant(name="load .7, delta .5", right=FEWER, load_ratio=0.7, gamma=0.5, trainings=2),
    Plant(name="disjoint features", right=(FEATURES,), shared=0.0, trainings=2),
    Plant(name="rates halved in B", right=(LOAD, FEATURES), rate_ratio=0.5, trainings=2),
    Plant(name="Gaussian", right=NO_CONCLUSION, data="gaussian"),
    Plant(name="n = .6 F", right=NO_CONCLUSION, gamma=0.5, size=0.6),
    Plant(name="wrong k", right=NO_CONCLUSION, gamma=0.5, k_factor=4.0, trainings=2),
    Plant(name="bigrams", right=NO_CONCLUSION, gamma=0.5, bigram=True, trained_as="H1a"),
    Plant(name="H0, noise", right=("H0",), noise=0.05),
    Plant(name="H1a, noise", right=("H1a",), gamma=0.5, noise=0.05, trained_as="H0, noise"),
    Plant(name="H0, crowded", right=("H0",), instruments=CROWDED, trainings=2, k_more=(6, 12, 24, 48)),
    Plant(name="H1a, crowded", right=("H1a",), gamma=0.5, instruments=CROWDED, trainings=2, k_more=(6, 12, 24, 48)),
    Plant(name="H1a, control .95", right=("H1a",), gamma=0.5, control_gamma=0.95, trained_as="H1a"),
    Plant(name="iso-N, beta .5", right=NO_CONCLUSION, crowding=0.75, width_exponent=0.5, trained_as="H0"),
)
"""`noise` takes .05 of the variance, so that with what k leaves out about .1 is lost at the main k."""
BY_NAME = {plant.name: plant for plant in PLANTS}
TRAINED = tuple(plant for plant in PLANTS if plant.trained_as is None)
