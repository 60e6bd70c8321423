"""Two parquet files that `datasets` reads: a row for each feature, and a row for each example."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crosscoder.browser.records import Example, Records
from crosscoder.browser.tokens import TokenTexts
from crosscoder.browser.words import COLUMNS

FEATURES, EXAMPLES = "features.parquet", "examples.parquet"
_NUMBERS, _TEXTS = pa.list_(pa.float32()), pa.list_(pa.string())
_EFFECT = pa.struct(
    {"row": pa.string(), "promoted": _TEXTS, "promotion": _NUMBERS, "suppressed": _TEXTS, "suppression": _NUMBERS}
)
_NEAREST = pa.struct({"dictionary": pa.string(), "feature": pa.int32(), "site": pa.int32(), "cosine": pa.float32()})
PRECISION = ("layer_precision", "layer_precision_low", "layer_precision_high")
FEATURE_SCHEMA = pa.schema(
    {
        "feature": pa.int32(),
        "site": pa.int32(),
        "fired": pa.int64(),
        **{column.key: pa.float64() for column in COLUMNS},
        "peak_tokens": _TEXTS,
        "norm": _NUMBERS,
        "written": _NUMBERS,
        "read": _NUMBERS,
        "direction": _NUMBERS,
        **dict.fromkeys(PRECISION, _NUMBERS),
        "histogram_first_bin": pa.int32(),
        "histogram": pa.list_(pa.int64()),
        "effects": pa.list_(_EFFECT),
        "nearest": pa.list_(_NEAREST),
    }
)
EXAMPLE_SCHEMA = pa.schema(
    {
        "feature": pa.int32(),
        "kind": pa.string(),
        "band": pa.int8(),
        "rank": pa.int16(),
        "activation": pa.float32(),
        "document": pa.int32(),
        "block": pa.int32(),
        "position": pa.int32(),
        "ids": pa.list_(pa.int32()),
        "tokens": _TEXTS,
        "activations": _NUMBERS,
        "peak": pa.int16(),
        "layer_parts": pa.list_(_NUMBERS),
    }
)


class DataFiles:
    """The two files, written some features at a time."""

    def __init__(self, folder: Path, records: Records, texts: TokenTexts) -> None:
        self.records, self.texts, self.findings = records, texts, records.findings
        self._features = pq.ParquetWriter(folder / FEATURES, FEATURE_SCHEMA)
        self._examples = pq.ParquetWriter(folder / EXAMPLES, EXAMPLE_SCHEMA)

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._features.close()
        self._examples.close()

    def add(self, features: range, examples: list[Example]) -> None:
        """Rows of some features, and of their examples."""
        rows = [self._feature(one) for one in features]
        self._features.write_table(pa.Table.from_pylist(rows, FEATURE_SCHEMA))
        self._examples.write_table(pa.Table.from_pylist([self._example(one) for one in examples], EXAMPLE_SCHEMA))

    def _feature(self, feature: int) -> dict[str, Any]:
        records, findings = self.records, self.findings
        layer, first = records.layer(feature), records.histogram(feature)
        site = None if layer is None else findings.sites[layer]
        effects = records.effects(feature)
        names = [str(site)] if len(effects) == 1 and site is not None else [*findings.layer_names, "sum"]
        return {
            "feature": feature,
            "site": site,
            "fired": int(findings.activity.fired_F[feature]),
            **{column.key: records.number(column.key, feature) for column in COLUMNS},
            "peak_tokens": self.texts.of(records.peak_ids(feature)),
            "norm": findings.norm_FL[feature],
            "written": findings.profile_FL[feature],
            "read": findings.use_FL[feature],
            "direction": records.direction(feature),
            **{name: records.precision(feature, which) for which, name in enumerate(PRECISION)},
            "histogram_first_bin": first[0] if first[1] else None,
            "histogram": first[1],
            "effects": [
                {
                    "row": name,
                    "promoted": self.texts.of(up),
                    "promotion": gain,
                    "suppressed": self.texts.of(down),
                    "suppression": loss,
                }
                for name, (up, gain, down, loss) in zip(names, effects, strict=False)
            ],
            "nearest": [
                {"dictionary": name, "feature": one, "site": None if at < 0 else findings.sites[at], "cosine": cosine}
                for name, found in records.nearest(feature).items()
                for one, at, cosine in found
            ],
        }

    def _example(self, one: Example) -> dict[str, Any]:
        plain = {key: getattr(one, key) for key in ("feature", "kind", "band", "rank", "activation", "document")}
        plain |= {"block": one.block, "position": one.position, "peak": one.peak, "ids": one.ids}
        return {
            **plain,
            "tokens": self.texts.of(one.ids),
            "activations": one.activations,
            "layer_parts": None if one.parts is None else list(one.parts),
        }
