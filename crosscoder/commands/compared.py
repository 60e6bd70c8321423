"""The command that compares any dictionaries of one model on one text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from crosscoder.commands.activations import Reading
from crosscoder.commands.base import REPORT, Idle, require_free
from crosscoder.data.sites import needed_sites
from crosscoder.dictionary.saved import read_record
from crosscoder.foundation.console import give, human_bytes, say
from crosscoder.needs import Needs


@dataclass(frozen=True, kw_only=True)
class CompareDictionaries(Reading):
    """Compare dictionaries of one model on one text: what each counts, which features are the same, and where.

    Two seeds, a bank and a crosscoder, or ours and somebody's: each is read on the same held-out tokens; features are
    matched both ways by activity, and by what they write on common layers, beside what chance gives.

    $ crosscoder compare-dictionaries runs/cc0/dictionary runs/cc1/dictionary --activations runs/acts --out runs/seeds
    $ crosscoder compare-dictionaries runs/bank/dictionary runs/cc0/dictionary --activations runs/acts --out runs/arms
    $ crosscoder compare-dictionaries A B --subject HuggingFaceTB/SmolLM2-135M --tokens-folder runs/tokens --out runs/c

    Writes report.html, report.md, results.json and features.parquet, a line a feature.
    """

    dictionaries: tyro.conf.Positional[tuple[str, ...]]  # Folders or Hub names; in the report they are A, B, C, ...
    out: Path  # Folder to write
    null_draws: int = 20  # Shifts of the text against itself, and of decoders, for chance. 0: no null
    seed: int = 0  # Of the shifts
    raw_inputs: bool = False
    """Those that keep no scale of their inputs read activations as the model gives them."""

    def idle(self) -> Idle:
        found = {**super().idle(), "held-out tokens are read in order": ("window_tokens",)}
        return {**found, "dictionaries are compared on the model's own activations": ("null",)}

    def needs(self) -> Needs:
        rows: Needs = []
        for name, where in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", self.dictionaries, strict=False):
            config = read_record(where)[0]
            n = config.n_features * config.n_layers
            rows.append((f"{name}: {where}", f"{config.n_features:,} features, {config.n_layers} layers"))
            rows.append((f"{name}: weights", human_bytes(8 * n * config.d_model)))
        return [*rows, ("one block of similarities, of which six are held", "128.0 MiB"), ("writes", str(self.out))]

    def run(self) -> None:
        from crosscoder.report.page import render_report
        from crosscoder.studies.compared import FEATURES, compare_dictionaries, write_features

        require_free(self.out, *REPORT, FEATURES)
        for where in self.dictionaries:  # what is none is told before a model is loaded
            read_record(where)
        (held_out,) = self._with_layers().splits("held_out")
        if held_out.harvested is None:
            say("warning: the store keeps no record of what it reads, so nobody checks that both belong together")
        results, compared = compare_dictionaries(
            self.dictionaries,
            held_out,
            raw_inputs=self.raw_inputs,
            device=self.device,
            null_draws=self.null_draws,
            seed=self.seed,
            settings=self.settings(),
        )
        write_features(compared, self.out)
        give(render_report(results, self.out))

    def _with_layers(self) -> CompareDictionaries:
        """With the layers that the dictionaries read, where a model is read and none are named."""
        if self.activations is not None or self.layers is not None:
            return self
        records = [reads for _, reads in map(read_record, self.dictionaries) if reads is not None]
        sites = sorted({site for reads in records for site in needed_sites(reads)})
        return replace(self, layers=tuple(sites) or None)
