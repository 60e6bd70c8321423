"""Floor 2: training. Batches arrive as an iterable of tensors; what they mean is not known here."""

from crosscoder.training.chain import train_warm_chain
from crosscoder.training.frozen import Frozen
from crosscoder.training.step import NonFiniteError, TrainConfig
from crosscoder.training.trainer import TrainResult, train, train_many

__all__ = ["Frozen", "NonFiniteError", "TrainConfig", "TrainResult", "train", "train_many", "train_warm_chain"]
