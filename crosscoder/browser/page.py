"""The data files of the browser: an index of all features, the texts of tokens, what is sought, and blocks of pages.

A page of the file system may not fetch, so each file is a script that hands over one value. Scripts are ASCII JSON in
one call; strings become text of the page alone. Numbers of the index are little-endian arrays in base64.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.browser import words
from crosscoder.browser.findings import Findings
from crosscoder.browser.records import N_LABELS, Example, Records
from crosscoder.browser.tokens import TokenTexts, visible
from crosscoder.measure.examples import BINS_OF_OCTAVE

BLOCK = 256
"""Features of one block of pages."""
FULL = 250
"""Of an example's activations: that at its own token."""
_TYPES = {"f4": "<f4", "i4": "<i4", "u4": "<u4", "u1": "u1"}


def write_value(folder: Path, name: str, value: Any) -> None:
    """One value as a script beside the page."""
    body = json.dumps(value, allow_nan=False, separators=(",", ":"))
    (folder / f"data-{name}.js").write_text(f'crosscoder.put("{name}",{body});\n', encoding="ascii")


def packed(kind: str, values: np.ndarray) -> dict[str, str]:
    """An array as the browser decodes it."""
    body = np.ascontiguousarray(values, dtype=_TYPES[kind]).tobytes()
    return {"type": kind, "data": base64.b64encode(body).decode("ascii")}


class Pages:
    """Collects what the browser needs while records are made, and writes it."""

    def __init__(self, folder: Path, records: Records, texts: TokenTexts) -> None:
        self.folder, self.records, self.texts = folder, records, texts
        self.findings: Findings = records.findings
        n = len(self.findings)
        self.labels_Fn = np.full((n, N_LABELS), -1, dtype=np.int64)
        self._used: dict[int, int] = {}
        self._sought: list[tuple[np.ndarray, int]] = []

    def used(self, ids: Any) -> list[int]:
        """The places of tokens among those that the browser knows."""
        return [self._used.setdefault(int(one), len(self._used)) for one in ids]

    def add(
        self, features: range, strongest: dict[int, list[Example]], quantiles: dict[int, list[list[Example]]]
    ) -> None:
        """Write a block of pages: those of the next features."""
        pages = [self._page(one, strongest[one], quantiles[one]) for one in features]
        write_value(self.folder, f"{features.start // BLOCK:04d}", pages)

    def _page(self, feature: int, strongest: list[Example], quantiles: list[list[Example]]) -> dict[str, Any]:
        records, findings = self.records, self.findings
        peaks, effects = self.used(records.peak_ids(feature)), records.effects(feature)
        self.labels_Fn[feature, : len(peaks[:N_LABELS])] = peaks[:N_LABELS]
        shown = [(self.used(up), _short(gain), self.used(down), _short(loss)) for up, gain, down, loss in effects]
        sought = {*peaks, *(shown[-1][0] if shown else ())}
        self._sought.append((np.array(sorted(sought), dtype=np.int64), feature))
        names, layer = list(findings.nearest), records.layer(feature)
        page = {
            "h": records.histogram(feature),
            "p": _short(findings.profile_FL[feature]),
            "u": _short(findings.use_FL[feature]),
            "c": _short(records.direction(feature)),
            "r": _short(records.precision(feature)),
            "l": shown,
            "t": [self._example(one) for one in strongest],
            "g": [_grid(one.parts) for one in strongest if one.parts is not None],
            "q": [[self._example(one) for one in band] for band in quantiles],
            "nb": [
                (names.index(name) - ("" in names), [(one, at, round(cosine, 3)) for one, at, cosine in found])
                for name, found in records.nearest(feature).items()
                if found
            ],
        }
        return page if layer is None else {**page, "y": layer}

    def _example(self, one: Example) -> tuple[Any, ...]:
        levels = np.where(np.isnan(one.activations), -1, np.round(FULL * one.activations / one.activation))
        return (
            _short([one.activation])[0],
            one.block,
            one.position,
            self.used(one.ids),
            levels.astype(int).tolist(),
            one.peak,
        )

    def finish(self, *, title: str, lead: str, facts: list[tuple[str, str]]) -> None:
        """Write the index, the texts, and which features are found by which token."""
        findings, rows = self.findings, len(self._used)
        write_value(self.folder, "tokens", [visible(self.texts[one]) for one in self._used])
        number = np.concatenate([ids for ids, _ in self._sought]) if self._sought else np.zeros(0, dtype=np.int64)
        of = np.repeat([one for _, one in self._sought], [len(ids) for ids, _ in self._sought]).astype(np.int64)
        order = np.argsort(number, kind="stable")
        starts = np.searchsorted(number[order], np.arange(rows + 1))
        write_value(self.folder, "search", {"starts": packed("u4", starts), "features": packed("u4", of[order])})
        strongest_F = findings.profile_FL.argmax(1)
        largest_F1 = findings.profile_FL.max(1, keepdims=True)
        height_FL = np.divide(
            findings.profile_FL, largest_F1, out=np.zeros_like(findings.profile_FL), where=largest_F1 > 0
        )
        data = {key: packed("f4", values) for key, values in findings.columns.items()}
        data |= {"labels": packed("i4", self.labels_Fn), "profile": packed("u1", np.round(255 * height_FL))}
        data |= {
            "strongest": packed("u1", np.minimum(strongest_F, 255)),
            "ids": packed("i4", np.array(list(self._used))),
        }
        number_column = words.Column("number", "Number", "The feature's number in its dictionary.", "whole")
        index = {
            "n": len(findings),
            "block_size": BLOCK,
            "title": visible(title),
            "name": visible(title),
            "lead": visible(lead),
            "facts": [[visible(one) for one in pair] for pair in facts],
            "layers": findings.layer_names,
            "columns": [one._asdict() for one in (*words.COLUMNS, number_column)],
            "sort": "rate",
            "bins": {"first": 0, "each": BINS_OF_OCTAVE},
            "others": [visible(name) for name in findings.nearest if name],
            "notes": self._notes(),
            "data": data,
        }
        write_value(self.folder, "index", index)

    def _notes(self) -> dict[str, Any]:
        reads = self.findings.dictionary.reads
        site = words.SITES[reads.site] if reads is not None else ""
        no_effects = self.findings.no_effects or "It is not known for features that were never active."
        return {
            "effects": words.EFFECTS.format(site=site).strip(),
            "no_effects": visible(no_effects),
            "quantiles": words.QUANTILES.format(sampled=self.findings.activity.wanted.sampled),
            "nearest": words.NEAREST,
            "definitions": list(words.DEFINITIONS),
        }


def _short(values: Any) -> Any:
    """Numbers with four significant digits."""
    return None if values is None else [None if one is None else float(f"{one:.4g}") for one in values]


def _grid(parts_WK: np.ndarray) -> list[list[int | None]]:
    """Each layer's parts at each token, in per cent of the largest."""
    largest = np.nanmax(np.abs(parts_WK)) if not np.isnan(parts_WK).all() else 0.0
    scaled = np.nan_to_num(100 * parts_WK / largest if largest > 0 else parts_WK)
    rows: list[list[int | None]] = scaled.round().astype(int).T.tolist()
    for token in np.flatnonzero(np.isnan(parts_WK).all(1)):
        for row in rows:
            row[token] = None
    return rows
