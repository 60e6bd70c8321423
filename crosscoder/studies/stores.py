"""Where the activations of a study's subjects lie, or how they are harvested as dictionaries train."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import stored_source
from crosscoder.data.sources import SiteSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import USUAL_LOADING, Loading, load_model, load_untrained
from crosscoder.data.tokens import TokenBlocks
from crosscoder.results.table import Site

UNFINISHED = "unfinished"
"""Folder of a study in which trainings go on, until what is measured of them is kept."""


@dataclass(frozen=True)
class Streamed:
    """A model whose activations are harvested as cells train, and not stored."""

    subject: Path | str
    tokens: Path
    """Folder of token blocks."""
    most: tuple[int, int]
    """Tokens to read for training and held out."""
    untrained: bool = False
    layers: tuple[int, ...] | None = None
    blocks_path: str | None = None
    keep_outliers: bool = False
    loading: Loading = USUAL_LOADING

    def source(self, site: Site, device: str) -> SiteSource:
        how = {"layers": self.layers, "blocks_path": self.blocks_path, "keep_outliers": self.keep_outliers}
        harvester = ResidualHarvester(self.model(device), **how)  # ty: ignore[invalid-argument-type]
        train, held_out = (TokenBlocks.load(self.tokens / split) for split in ("train", "held_out"))
        other = ActivationStream(harvester, held_out, max_tokens=self.most[1], ahead=False)
        return SiteSource(ActivationStream(harvester, train, max_tokens=self.most[0]), other, site)

    def model(self, device: str) -> nn.Module:
        """The model, trained or with weights drawn anew."""
        if not self.untrained:
            return load_model(self.subject, **asdict(self.loading), device=device)
        revision, dtype = self.loading.revision, self.loading.dtype
        return load_untrained(self.subject, revision=revision, dtype=dtype, device=device)


@dataclass(frozen=True)
class Stores:
    """Where a subject's activations lie, and what a spliced evaluation needs of it."""

    train: Path
    held_out: Path
    streamed: Streamed | None = None
    """Where nothing is stored."""
    subject: Path | str | None = None
    """Folder or name of the subject, for splicing; None leaves splicing out."""
    held_out_ids: Path | None = None
    """Token blocks `[n, S]` to splice on, as safetensors."""
    tokens: Path | None = None
    """Folder of the token blocks, for labels of the text."""
    blocks_path: str | None = None
    loading: Loading = USUAL_LOADING

    def source(self, site: Site, device: str) -> SiteSource:
        """The activations of one site; hashes are not checked again."""
        if self.streamed is not None:
            return self.streamed.source(site, device)
        return stored_source(self.train, self.held_out, site, verify=False)
