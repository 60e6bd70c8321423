"""Rows of a study whose numbers are planted laws, so that what the verdict room makes of them is known."""

import math
from dataclasses import replace

from crosscoder.results.table import LongTable, Place, Row

SHAPES = {"A": (8, 64), "B": (2, 128)}
K = (2, 4, 8, 16)
FVU = dict(zip(K, (0.2, 0.12, 0.08, 0.05), strict=True))
SHARE = dict(zip(K, (0.1, 0.06, 0.03, 0.02), strict=True))
JOINT, BANK = {"A": 20.0, "B": 11.0}, {"A": 9.0, "B": 7.0}
"""ln-ln laws `load = factor * fvu^-.5`, of a layer in a bank."""
TRAININGS = (0.97, 1.0, 1.04, 1.01, 0.98)


def dictionary_rows(subject, arm, factor, *, state="trained", ks=K, seeds=(0, 1), spread=1.0, room=100.0):
    """Of every training dictionaries of several k; trainings differ by `TRAININGS` to the power `spread`."""
    found = []
    for t, own in enumerate(TRAININGS):
        for k in ks:
            for seed in seeds:
                where = {"subject": subject, "training_seed": t, "state": state, "site": "write", "arm": arm}
                at = Place(**where, role="main" if k == K[1] else "k", n_features=1024, k=k, seed=seed)
                varies = own ** (spread * (1.1 if arm == "layerwise" else 1.0))
                load = varies * factor * FVU[k] ** -0.5 * (1.02 if seed else 1 / 1.02) ** own
                spliced = replace(at, layer="all")
                found += [
                    Row(at, "entropy_load", load),
                    Row(at, "explained_variance", 1 - FVU[k]),
                    Row(at, "effective_dimension", room * own),
                    Row(at, "dictionary_size", 1024),
                    Row(at, "alive", 1000),
                    Row(at, "dead_share", 0.02),
                    Row(at, "l0_token", float(k)),
                    Row(at, "raw_density", load / room / own),
                    Row(at, "raw_density_rest", load / room / own * 1.01),
                    Row(at, "clean_loss", 2.5),
                    Row(spliced, "spliced_loss", 2.5 + 2 * SHARE[k]),
                    Row(spliced, "ablated_loss", 4.5),
                    Row(replace(at, layer="3"), "spliced_loss", 9.0),
                ]
    return found


def subject_rows(subject, *, loss=2.6, trigram=2.8, lookup=0.6, room=30.0, layers=2.0, twins=0.01):
    """Losses, tables, rooms, causal layers and what two dictionaries share."""
    found = []
    for t, own in enumerate(TRAININGS):
        at = Place(subject=subject, training_seed=t)
        write = replace(at, state="trained", site="write")
        main = replace(write, arm="crosscoder", role="main")
        first = replace(main, n_features=1024, k=K[1], seed=0)
        found += [
            Row(at, "held_out_loss", loss * own**0.2),
            Row(at, "trigram_loss", trigram * own**0.1),
            Row(at, "lookup_share", lookup * own),
            Row(at, "rate_share", 0.15),
            Row(replace(write, estimator="model"), "room", room * own),
            Row(replace(write, estimator="scaled"), "room", 2 * room * own),
            Row(main, "self_cosine", 0.95 * own**0.1),
            Row(main, "point_matched_share", 0.8 * own**0.1),
            Row(first, "causal_layers", layers * own),
            Row(first, "conjunctive_share", 0.05 * own),
            Row(first, "twin_share", twins * own),
        ]
    return found


def null_rows(state, *, factors=(25.0, 24.0), banks=(12.0, 11.0)):
    """Dictionaries of a null: loads of A and B at the same fidelities."""
    found = []
    for name, factor, bank in zip("AB", factors, banks, strict=True):
        found += dictionary_rows(name, "crosscoder", factor, state=state, seeds=(0,), spread=0.5)
        found += dictionary_rows(name, "layerwise", bank, state=state, seeds=(0,), spread=0.5)
    return found


def study_rows(*, joint=JOINT, bank=BANK, extra=(), **changes):
    """A whole study, with Gaussian and frozen-encoder nulls, calibration and what compares features."""
    rows = []
    for name in SHAPES:
        rows += subject_rows(name, **changes.get(name, {}))
        rows += dictionary_rows(name, "crosscoder", joint[name], room=100.0 if name == "A" else 55.0)
        rows += dictionary_rows(name, "layerwise", bank[name], seeds=(0,))
        larger = Place(subject=name, training_seed=0, state="trained", site="write", arm="crosscoder", role="size",
                       n_features=2048, k=K[1], seed=0)  # fmt: skip
        first = next(
            r for r in rows if r.key == "entropy_load" and r.at == replace(larger, role="main", n_features=1024)
        )
        rows += [Row(larger, "entropy_load", first.value * 1.1), Row(larger, "effective_dimension", 110.0)]
    rows += null_rows("gaussian") + null_rows("frozen_encoder")
    planted = Place(role="calibration", seed=0)
    rows += [Row(planted, key, value) for key, value in (("calibration_mcc", 0.95), ("calibration_q_error", 0.03),
             ("calibration_g_error", 0.04), ("calibration_room_error", 0.05))]  # fmt: skip
    return LongTable((*rows, *extra))


def logs(joint=JOINT, bank=BANK):
    """The planted q and r."""
    q = math.log(joint["B"] / joint["A"])
    r = math.log(8 * 64 / (2 * 128)) + math.log(2 * bank["B"] / (8 * bank["A"]))
    return q, r, (math.log(2) + q - r) / math.log(4)
