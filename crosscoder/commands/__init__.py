"""The commands that take one step each, from text to a measured dictionary that others can load: their flags, and what
they do."""

from crosscoder.commands.activations import Evaluate, Harvest, Train
from crosscoder.commands.compared import CompareDictionaries
from crosscoder.commands.effects import Effects
from crosscoder.commands.exchange import Convert
from crosscoder.commands.features import Features
from crosscoder.commands.sharing import Card, Plot, Push
from crosscoder.commands.text import Prepare, TrainSubject

STEPS = (
    *(Prepare, TrainSubject, Harvest, Train, Evaluate, Features, Effects, CompareDictionaries),
    *(Plot, Card, Push, Convert),
)
