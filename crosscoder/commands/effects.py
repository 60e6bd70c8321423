"""The command that takes features off a model, one at a time, and measures what it predicts then."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from crosscoder.commands.base import REPORT, SUBJECT, Idle, Printed, ReadsModel, require_free
from crosscoder.data.sources import SiteKind
from crosscoder.dictionary import load_dictionary
from crosscoder.dictionary.saved import read_record
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import give, say
from crosscoder.needs import Needs

TOP = 20  # features, where none are named


@dataclass(frozen=True, kw_only=True)
class Effects(ReadsModel, Printed):
    """Take features off the model, and add them, one by one: what that does to its next-token distribution.

    Each feature is taken off a row of text wherever it is active there, and added where it is not: how far do its own
    promoted tokens move? Beside it, at the same tokens and by the same activations, directions of the same norms are
    moved: isotropic ones, what any push of that size does, and differences of activations, which the model may meet.

    $ crosscoder effects --dictionary runs/cc/dictionary --subject M --tokens-folder runs/tokens --out runs/effects

    With `--features 12 40 --each-layer --rows 12` two features, layer by layer, on rows enough for an interval.

    Writes report.html, report.md, results.json and effects.csv, and prints the table.
    """

    dictionary: str  # What `crosscoder train` wrote, or a dictionary's name on the Hub
    subject: Annotated[str, SUBJECT]
    tokens_folder: Path  # What `crosscoder prepare` wrote, with the subject's own tokenizer; its held-out part is read
    out: Path  # Folder to write
    features: tuple[int, ...] = ()  # Numbers; of a bank, layer * F + feature. Empty: the --top ones
    top: int | None = None  # So many of the alive features. None: 20
    by: Literal["use", "rate"] = "use"  # Which are first: by energy E[f^2] |W|^2, or by the share of tokens
    text_rows: int = 256  # Held-out rows, evenly spread, in which activity is looked for
    rows: int = 8  # Rows of text for each feature, of those in which it is active; 12 or so give intervals
    draws: int = 4  # Random directions of each of two kinds beside each feature. 0: none
    each_layer: bool = False  # Also at each layer alone
    site: SiteKind = "residual"  # Of a dictionary without a record, with --layers: what it reads
    seed: int = 0  # Of rows and directions

    def idle(self) -> Idle:
        record = None
        with contextlib.suppress(FileNotFoundError):  # which is said when it runs
            record = read_record(self.dictionary)[1]
        found: Idle = {"the dictionary says what it reads": ("reads", "mlp_path", "keep_outliers")}
        if self.features:
            found["features are named"] = ("top", "by")
        if record is not None:
            found["the dictionary's record says which sites it reads"] = ("layers", "site")
        return found

    def needs(self) -> Needs:
        config, n = read_record(self.dictionary)[0], len(self.features) or self.top or TOP
        places = 2 + (config.n_layers if self.each_layer else 0)
        return [
            ("features", f"{n:,}"),
            ("rows of text read for activity, at most", f"{self.text_rows:,}"),
            ("rows of text run through the model, at most", f"{n * self.rows * (1 + places * (1 + 2 * self.draws)):,}"),
            ("writes", str(self.out)),
        ]

    def run(self) -> None:
        from crosscoder.data.subject import load_model, require_own_tokens
        from crosscoder.data.tokens import PreparedTokens
        from crosscoder.report.effects import TABLE, by_feature, terminal_table, write_table
        from crosscoder.report.page import render_report
        from crosscoder.studies.effects import Where, run_effects

        require_free(self.out, *REPORT, TABLE)
        for name in ("text_rows", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.draws < 0 or (self.top is not None and self.top < 1):
            raise ValueError(f"--draws {self.draws} --top {self.top}; expected 0 or more, and 1 or more")
        dictionary, tokens = load_dictionary(self.dictionary).to(self.device), PreparedTokens.load(self.tokens_folder)
        where: dict[str, Any] = {"layers": self.layers, "kind": self.site}
        if (reads := dictionary.reads) is not None:
            if reads.site == "mlp":
                raise ValueError("the dictionary reads MLPs; features are taken off residual streams and block writes")
            where = {"layers": reads.sites, "kind": reads.site}
        elif self.layers is None:
            raise ValueError("the dictionary keeps no record of what it reads; say it by --layers and --site")
        else:
            say("warning: the dictionary keeps no record of what it reads, so nobody checks that it is of this model")
        require_own_tokens(self.subject, tokens.held_out, revision=self.loading.revision)
        model = load_model(self.subject, **asdict(self.loading), device=self.device)
        results = run_effects(
            dictionary,
            model,
            tokens,
            self.features or self.top or TOP,
            Where(**where, blocks_path=self.blocks_path),
            by=self.by,
            n_text_rows=self.text_rows,
            n_rows=self.rows,
            n_draws=self.draws,
            each_layer=self.each_layer,
            seed=self.seed,
            settings=self.settings(),
        )
        path = render_report(results, self.out)
        write_table(results, self.out)
        if self.json:
            give(json.dumps({"report": str(path), "features": to_mapping(by_feature(results))}, indent=2))
            return
        give(terminal_table(results))
        give(path)
