"""The training runs of a study: checkpoints matched by loss, what each shape is, and what was made equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.data.prepared import PreparedTokens
from crosscoder.data.subject import count_parameters
from crosscoder.data.subject_training import SubjectCheckpoint, SubjectRun, held_out_loss
from crosscoder.studies import answer as assembly
from crosscoder.studies.presets import Run, StudyConfig

LOSS_GAP = 0.01  # held-out losses further apart than this are not called matched


@dataclass(frozen=True)
class MatchedRuns:
    """One checkpoint of every run, so that all held-out losses agree as well as can be, as late as can be."""

    index: dict[Run, int]
    checkpoints: dict[Run, SubjectCheckpoint]
    gap: float  # largest less smallest loss, over their mean

    @property
    def matched(self) -> bool:
        """Whether the gap is within the limit."""
        return self.gap <= LOSS_GAP


def match_losses(runs: Mapping[Run, Sequence[SubjectCheckpoint]]) -> MatchedRuns:
    """Among choices within half the allowed gap the one with the lowest loss; without any, the closest.

    For every loss that some checkpoint has, each run offers the checkpoint nearest to it. The initial weights (the
    first checkpoint of each) take no part.
    """
    losses = {run: np.array([c.held_out_loss for c in found[1:]]) for run, found in runs.items()}
    choices = []
    for target in sorted(set(np.concatenate(list(losses.values())).tolist())):
        index = {run: int(np.abs(values - target).argmin()) for run, values in losses.items()}
        chosen = np.array([losses[run][i] for run, i in index.items()])
        choices.append((float(np.ptp(chosen) / chosen.mean()), float(chosen.mean()), index))
    close = [choice for choice in choices if choice[0] <= LOSS_GAP / 2]
    gap, _, index = min(close, key=lambda c: c[1]) if close else min(choices, key=lambda c: c[0])
    found = {run: i + 1 for run, i in index.items()}
    return MatchedRuns(found, {run: runs[run][i] for run, i in found.items()}, gap)


@dataclass(frozen=True)
class Part:
    """One of `count` shares of a study's work: whole training runs with everything that is measured on them."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"part {self.index} of {self.count}; expected a number from 0 to {self.count - 1}")

    def holds(self, run: Run, runs: Sequence[Run]) -> bool:
        """Whether a training run is this part's."""
        return sorted(runs).index(run) % self.count == self.index


class OtherPartsError(RuntimeError):
    """This part's work is done, and results need what other parts have yet to do."""


def describe_subject(
    name: str,
    config: StudyConfig,
    runs: dict[Run, SubjectRun],
    matched: MatchedRuns,
    tokens: PreparedTokens,
) -> dict[str, Any]:
    """One shape: sizes, and the losses of all its training runs; curve and text of the first."""
    run, checkpoint = runs[name, 0], matched.checkpoints[name, 0]
    stride = max(1, len(tokens.held_out) // 256)
    rows = []
    for t, seed in enumerate(config.subjects.seeds):
        model = runs[name, t].load_model(matched.index[name, t])
        rows.append(
            {
                "seed": seed,
                "held_out_loss": held_out_loss(model, tokens.held_out[::stride]),
                "tokens": matched.checkpoints[name, t].tokens,
                "untrained_loss": runs[name, t].checkpoints[0].held_out_loss,
            }
        )
    counts = count_parameters(run.load_model(matched.index[name, 0]))
    shape = run.config
    return {
        "name": name,
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "parameters": {
            "non_embedding": counts.non_embedding_matrices,
            "embedding": counts.embedding,
            "norms": counts.norms,
        },
        "neurons_per_layer": shape.d_model,
        "total_neurons": shape.n_layers * shape.d_model,
        "held_out_loss": float(np.mean([row["held_out_loss"] for row in rows])),
        "held_out_loss_unit": "nats/token",
        "tokens": round(np.mean([row["tokens"] for row in rows])),
        "epochs": run.epochs * checkpoint.tokens / run.checkpoints[-1].tokens,
        "curve": [{"step": c.step, "tokens": c.tokens, "held_out_loss": c.held_out_loss} for c in run.checkpoints[1:]],
        "runs": rows,
        "untrained_loss": run.checkpoints[0].held_out_loss,
        "description": f"Llama-style decoder, {shape.n_layers} layers of width {shape.d_model}, vocabulary "
        f"{tokens.train.vocab_size}, context {shape.context}, learning rate {shape.learning_rate:g}; trained with "
        f"seeds {', '.join(map(str, config.subjects.seeds))}",
    }


def losses(subject: dict[str, Any]) -> list[float]:
    """Held-out losses of all training runs of a shape."""
    return [row["held_out_loss"] for row in subject["runs"]]


def relative_gap(losses: Sequence[float]) -> float:
    """Largest less smallest, over the mean."""
    return float(np.ptp(losses) / np.mean(losses))


def matched_items(
    config: StudyConfig, matched: MatchedRuns, subjects: dict[str, Any], tokens: PreparedTokens
) -> list[dict[str, Any]]:
    """What of the subjects was made equal, and what was not; dictionaries are added from their results."""

    def both(function: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        return {name: function(subject) for name, subject in subjects.items()}

    gap = relative_gap([loss for subject in subjects.values() for loss in losses(subject)])
    parameters = both(lambda s: s["parameters"]["non_embedding"])
    seen = both(lambda s: s["tokens"])
    return [
        assembly.matched_item(
            "non-embedding parameters",
            parameters,
            max(parameters.values()) <= 1.02 * min(parameters.values()),
            "matrices of the blocks; 12 L d^2 to within rounding of the widths; C's width is rounded to an even head",
        ),
        assembly.matched_item(
            "held-out loss, nats/token",
            both(lambda s: s["held_out_loss"]),
            gap <= LOSS_GAP,
            f"means over training seeds; largest gap of any two runs {gap:.2%} on a larger held-out sample, "
            f"{matched.gap:.2%} where checkpoints were chosen; limit {LOSS_GAP:.0%}",
        ),
        assembly.matched_item(
            "training tokens at the matched checkpoint",
            seen,
            len(set(seen.values())) == 1,
            "means over training seeds; equal loss does not hold at equal tokens, so checkpoints are matched by loss; "
            "earlier ones were taken before their learning rate had fallen as far",
        ),
        assembly.matched_item(
            "text, its order, tokenizer",
            both(lambda _: f"{config.subjects.text}, vocabulary {tokens.train.vocab_size}"),
            True,
            f"the same blocks in the same order; {tokens.train.n_tokens:,} training tokens in all",
        ),
        assembly.matched_item(
            "embedding parameters",
            both(lambda s: s["parameters"]["embedding"]),
            False,
            "vocabulary times width: B has twice A's; tied with the output matrix",
        ),
        assembly.matched_item("norm parameters", both(lambda s: s["parameters"]["norms"]), False, "not counted in N"),
        assembly.matched_item(
            "total neurons L * D",
            both(lambda s: s["total_neurons"]),
            False,
            "the question itself: equal parameters, half the neurons",
        ),
        assembly.matched_item(
            "training seeds",
            both(lambda s: len(s["runs"])),
            True,
            "trainings of each shape; intervals of the verdict cover them, ranges in the tables below too",
        ),
    ]
