"""Dictionaries of other libraries, found by what their folders hold, as dictionaries of this one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from crosscoder.dictionary import Crosscoder, Dictionary, LayerwiseSAE, load_dictionary
from crosscoder.dictionary.scale import rescale
from crosscoder.formats import dictionary_learning, gemma_scope, kissane, saelens, sparsify
from crosscoder.formats.foreign import hash_files
from crosscoder.formats.imported import UNSAID, Flat, bank, printable
from crosscoder.foundation.artifact import read_json
from crosscoder.foundation.console import say
from crosscoder.foundation.hub import local_folder
from crosscoder.foundation.origin import ModelOrigin, Reads

Library = Literal["crosscoder", "saelens", "dictionary_learning", "ckkissane", "sparsify", "gemma-scope-2"]
OURS = "crosscoder"
LAYER = re.compile(r"(?:layers?|blocks)[-_.]?(\d+)")
ROOT_FILES = (
    *("config.json", "cfg.json", "MANIFEST.json", saelens.WEIGHTS, sparsify.WEIGHTS, *dictionary_learning.WEIGHTS),
    *(kissane.WEIGHTS, "cc_weights.safetensors", "params.safetensors", "params_layer_*.safetensors"),
)
"""What is fetched of a repository on the Hub where no folder in it is named."""


class Importer(NamedTuple):
    """How dictionaries of one library are read: the function, and the files of weights of a folder."""

    read: Callable[..., Flat | Crosscoder]
    weights: Callable[[Path], Sequence[Path]]


IMPORTERS: dict[str, Importer] = {
    "saelens": Importer(saelens.read, lambda folder: [folder / saelens.WEIGHTS]),
    "sparsify": Importer(sparsify.read, lambda folder: [folder / sparsify.WEIGHTS]),
    "ckkissane": Importer(kissane.read, lambda folder: [kissane.weights_file(folder)]),
    "gemma-scope-2": Importer(gemma_scope.read, gemma_scope.parameter_files),
    "dictionary_learning": Importer(
        dictionary_learning.read, lambda folder: [dictionary_learning.weights_file(folder)]
    ),
}
LLAMASCOPIUM = (
    "it is of llamascopium (OpenMOSS): its crosscoders activate each layer's part of a feature by that layer's own "
    "decoder norm, which is another function than a crosscoder's one code for all layers, and its other classes "
    "normalise by settings that are not in the weights. It is not imported; its SAEs can be saved for SAELens, and "
    "imported from there"
)


def detect(folder: Path) -> Library | None:
    """Which library wrote a folder; None where it holds no dictionary itself."""
    has = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set[str]()
    config: Any = read_json(folder / "config.json") if "config.json" in has else {}
    config = config if isinstance(config, dict) else {}
    if "sae_type" in config:
        raise ValueError(f"{folder}: {LLAMASCOPIUM}")
    is_learnt = bool({"ae.pt", "ae.safetensors"} & has) or bool({"trainer", "dict_size"} & config.keys())
    found: dict[Library, bool] = {
        "crosscoder": "class" in config and "settings" in config,
        "saelens": {"cfg.json", saelens.WEIGHTS} <= has,
        "sparsify": {"cfg.json", sparsify.WEIGHTS} <= has,
        "ckkissane": bool({"cc_weights.pt", "cc_weights.safetensors"} & has),
        "gemma-scope-2": bool({"params.safetensors", "params_layer_0.safetensors"} & has),
        "dictionary_learning": is_learnt and bool({*dictionary_learning.WEIGHTS} & has),
    }
    names = [name for name, is_there in found.items() if is_there]
    if len(names) > 1:
        raise ValueError(f"{folder} holds files of {' and of '.join(names)}; say which with --library")
    return names[0] if names else None


def import_dictionary(
    where: str | Path,
    *,
    folders: Sequence[str] = (),
    library: Library | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    model: str = "",
    sites: Sequence[int] = (),
    scale: Sequence[float] = (),
) -> Dictionary:
    """The dictionary of another library in a folder or a repository on the Hub, or ours, for evaluation.

    Its record says what its publisher says of model and places, and the revision and sha256 of what was read. One of
    ours that comes back from SAELens' format has the record and the scale that it had.

    where: a folder of one dictionary, or of one folder for each layer, which become a bank.
    folders: which folders in it; several are the layers of a bank, in this order.
    library: which wrote it; None finds out.
    allow_pickle: read .pt files, with `torch.load(weights_only=True)`.
    model, sites: what the publisher does not say: the model's name, and the residual stream's sites, one for each
        layer (0 the embedding, l the output of block l).
    scale: what activations of each layer were multiplied by in training, where the files do not say; 1 if empty.

    Raises:
        FileNotFoundError: there is no such dictionary.
        DamagedArtifactError: files are not what they claim to be.
        ValueError: what it is cannot be told, is not imported (says why), or contradicts what is given.
    """
    files = [f"{name.strip('/')}/*" for name in folders] or ROOT_FILES
    root = local_folder(where, files=files, revision=revision)
    chosen = [root / name for name in folders] or [root]
    if missing := [one for one in chosen if not one.is_dir()]:
        raise FileNotFoundError(f"{missing[0]} is not a folder")
    library = library or detect(chosen[0])
    if library is None and not folders:
        chosen = _layer_folders(root, where)
        library = detect(chosen[0])
    if library is None:
        raise ValueError(
            f"{chosen[0]} holds no dictionary of {', '.join(get_args(Library))} (what is known by which files is in "
            "docs/formats.md)"
        )
    if library == OURS and len(chosen) > 1:
        raise ValueError(f"{len(chosen)} folders of ours; load them one by one")
    made = load_dictionary(chosen[0]) if library == OURS else _read(library, chosen, allow_pickle=allow_pickle)
    if library == OURS or (made.reads is not None and not made.reads.published):
        if model or sites or scale:
            raise ValueError(f"{chosen[0]} is ours, and keeps its own model, sites and scale; leave them out")
        if library != OURS and made.reads is not None and made.reads.scale:
            rescale(made, torch.tensor(made.reads.scale))
        return made
    name = str(where) if root == Path(where) else f"{where}@{root.name}"
    inside = "".join(f" {one.relative_to(root)}" for one in chosen if one != root)
    weights = [file for one in chosen for file in IMPORTERS[library].weights(one)]
    assert made.reads is not None
    reads = _completed(made.reads, model, sites, made.config.n_layers)
    if reads.convention == UNSAID:
        say(f"note: {chosen[0]} does not say which places it reads; say sites of a residual stream with --sites")
    published = f"{library} dictionary of {printable(name + inside)}, sha256 {hash_files(weights)}"
    made.reads = replace(reads, published=published)
    if scale:
        fold_scale(made, scale)
    return made


def _read(library: Library, chosen: Sequence[Path], *, allow_pickle: bool) -> Crosscoder | LayerwiseSAE:
    if other := next((one for one in chosen[1:] if detect(one) not in (library, None)), None):
        raise ValueError(f"{other} is of another library than {chosen[0]}, which is of {library}")
    flats = list[Flat]()
    for one in chosen:
        made = IMPORTERS[library].read(one, allow_pickle=allow_pickle)
        if isinstance(made, Flat):
            flats.append(made)
        elif len(chosen) == 1:
            return made
        else:
            raise ValueError(f"{one} holds a crosscoder or transcoder, which is no layer of a bank; convert it alone")
    return bank(flats)


def _layer_folders(root: Path, where: object) -> list[Path]:
    """The folders of a folder that hold one dictionary each, by layer, if nothing but the layer differs."""
    found = {one: LAYER.search(one.name) for one in sorted(root.iterdir()) if one.is_dir() and detect(one) is not None}
    if not found:
        raise FileNotFoundError(
            f"{where} holds no dictionary, and no folders of them; --folders names some deeper in it"
        )
    numbers = [None if name is None else int(name[1]) for name in found.values()]
    kinds = {LAYER.sub("", one.name, count=1) for one in found}
    if None in numbers or len({*numbers}) < len(numbers) or len(kinds) > 1:
        names = ", ".join(one.name for one in found)
        raise ValueError(
            f"{where} holds {len(found)} dictionaries that are not one for each layer: {names:.500}. Name the layers "
            "of a bank, or the one dictionary, with --folders"
        )
    return sorted(found, key=lambda one: int(LAYER.search(one.name)[1]))  # ty: ignore[not-subscriptable]


def _completed(reads: Reads, model: str, sites: Sequence[int], n_layers: int) -> Reads:
    """The record with what the publisher did not say."""
    if model and reads.model.name not in ("", model):
        raise ValueError(f"the dictionary says that it is of {reads.model.name}; --model says {model}")
    reads = replace(reads, model=ModelOrigin(name=model or reads.model.name, weights=""))
    if not sites:
        return reads
    if len(sites) != n_layers or min(sites) < 0:
        raise ValueError(f"sites are {list(sites)}; expected {n_layers}, one for each layer, 0 being the embedding")
    if reads.site == "residual" and reads.sites != tuple(sites):
        raise ValueError(f"the dictionary says that it reads sites {list(reads.sites)}; --sites says {list(sites)}")
    if reads.site == "other" and reads.convention != UNSAID:
        raise ValueError(f"the dictionary says that it reads {reads.convention}; leave --sites out")
    return replace(reads, site="residual", sites=tuple(sites), convention="")


def fold_scale(dictionary: Dictionary, scale: Sequence[float]) -> None:
    """Make a dictionary of scaled activations one of raw ones, in place.

    scale: the factor of each layer, or of all.
    """
    n_layers = dictionary.config.n_layers
    if len(scale) not in (1, n_layers) or not all(0 < factor < float("inf") for factor in scale):
        raise ValueError(f"scale is {list(scale)}; expected {n_layers} positive numbers, one for each layer")
    dictionary.input_scale.copy_(torch.tensor(list(scale) * (n_layers if len(scale) == 1 else 1)))
    rescale(dictionary, torch.ones(n_layers))
    say(
        f"note: raw activations times {', '.join(f'{one:g}' for one in scale)} were its inputs; folded into the weights"
    )
