"""The commands that take one step each, from text to a measured dictionary: their flags, and what they do."""

from crosscoder.commands.activations import Evaluate, Export, Harvest, Train
from crosscoder.commands.text import Prepare, TrainSubject

STEPS = (Prepare, TrainSubject, Harvest, Train, Evaluate, Export)
