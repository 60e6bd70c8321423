"""Every number's sentence: one meaning a name, names that can be anchors, whole sentences."""

import importlib
import re

import pytest

MODULES = (
    "measure.counting",
    "measure.dimension",
    "measure.probes",
    "measure.saturation",
    "measure.splice",
    "measure.profile",
    "measure.statistics",
    "measure.universality",
    "verdict.decide",
)


def definitions(name):
    return importlib.import_module(f"crosscoder.{name}").DEFINITIONS


@pytest.mark.parametrize("name", MODULES)
def test_names_are_anchors_and_definitions_are_sentences(name):
    for key, sentence in definitions(name).items():
        assert re.fullmatch(r"[A-Za-z][\w.-]{0,63}", key)
        assert sentence.endswith(".")
        assert "  " not in sentence


def test_no_name_has_two_meanings():
    keys = [key for name in MODULES for key in definitions(name)]
    assert len(keys) == len(set(keys))
