"""The command between libraries: other people's dictionaries into ours, and ours out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from crosscoder.browser.source import source_of
from crosscoder.commands.base import BLOCKS_PATH, LOADING, RAW, SUBJECT, Command, Device, Idle
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import USUAL_LOADING, Loading, load_model, model_origin, require_own_tokens
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.dictionary import Dictionary
from crosscoder.formats.activity import Activity, collect_activity
from crosscoder.formats.convert import Library, import_dictionary
from crosscoder.formats.delphi import save_delphi
from crosscoder.formats.neuronpedia import Release, save_neuronpedia, unembedding
from crosscoder.formats.saelens import n_flat_dictionaries, save_saelens
from crosscoder.foundation.console import give, say

OF_TEXT = ("delphi", "neuronpedia")
PICKLE = "Read .pt files too, by torch.load(weights_only=True), which makes tensors and nothing else."


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Convert another library's dictionary into ours, or any into a format that other tools read.

    Read, and recognised by their files: SAELens 6, dictionary_learning and its crosscoders, ckkissane's crosscoders,
    sparsify, Gemma Scope 2, and our own; docs/formats.md says how exactly, and what is refused.

    $ crosscoder convert google/gemma-scope-2-270m-pt runs/gemma --folders crosscoder/layer_5_9_12_15_width_65k_l0_big
    $ crosscoder convert downloads/sparsify-saes runs/bank
    $ crosscoder convert runs/cc/dictionary runs/cc/saelens --format saelens

    A bank becomes one SAE for each of its layers, in layer-0/, layer-1/, ...; a crosscoder one flat SAE. Formats of
    examples read held-out text with the model:

    $ crosscoder convert runs/cc/dictionary runs/cc/latents --format delphi --subject gpt2 --tokens-folder runs/tokens
    """

    dictionary: tyro.conf.Positional[str]
    """Folder, or repository on the Hub, of one dictionary, or of one folder for each layer of a bank."""
    out: tyro.conf.Positional[Path]  # Folder to write
    format: Literal["crosscoder", "saelens", "delphi", "neuronpedia"] = "crosscoder"
    """crosscoder: ours. saelens: what SAELens 6 loads from disk. delphi: its cache of latents, to be explained.
    neuronpedia: its files for bulk import, a source a layer."""
    folders: tuple[str, ...] = ()
    """Folders in it: of the one dictionary among several, or of the layers of a bank, in their order."""
    dictionary_revision: str | None = None  # Of a repository on the Hub: a branch, tag or commit
    library: Library | None = None  # Which library wrote it. None: its files tell
    allow_pickle: Annotated[bool, tyro.conf.arg(help=PICKLE)] = False
    model_name: str = ""  # The model it was trained on, where its files do not say
    sites: tuple[int, ...] = ()
    """Residual stream sites of its layers, where its files do not say: 0 the embedding, l the output of block l."""
    scale: tuple[float, ...] = ()
    """What activations of each layer were multiplied by when it was trained, where its files do not say."""
    raw_inputs: Annotated[bool, RAW] = False
    subject: Annotated[str | None, SUBJECT] = None
    tokens_folder: Path | None = None  # What `crosscoder prepare` wrote, with the subject's own tokenizer
    max_tokens: int = 50_000  # Held-out tokens to read
    release: str = "crosscoder"  # With --format neuronpedia: the name of the release and its set of sources
    creator: str = ""  # With --format neuronpedia: who made it
    model_id: str = ""  # With --format neuronpedia: its name of the model. Empty: the subject's last part
    blocks_path: Annotated[str | None, BLOCKS_PATH] = None
    loading: tyro.conf.OmitArgPrefixes[Loading] = USUAL_LOADING
    device: Device = "cpu"

    def idle(self) -> Idle:
        named: Idle = {"only --format neuronpedia has names": ("release", "creator", "model_id")}
        if self.format in OF_TEXT:
            return {} if self.format == "neuronpedia" else named
        names = ("subject", "tokens_folder", "max_tokens", "blocks_path", "device", *LOADING)
        found: Idle = {"weights are converted without reading any text": names, **named}
        return found if self.format == "saelens" else {**found, "ours may read inputs at a scale": ("raw_inputs",)}

    def run(self) -> None:
        dictionary = import_dictionary(
            self.dictionary,
            folders=self.folders,
            library=self.library,
            revision=self.dictionary_revision,
            allow_pickle=self.allow_pickle,
            model=self.model_name,
            sites=self.sites,
            scale=self.scale,
        )
        say(f"{type(dictionary).__name__}({dictionary.extra_repr()})")
        match self.format:
            case "crosscoder":
                dictionary.save_pretrained(self.out)
            case "saelens":
                self._save_saelens(dictionary)
            case "delphi":
                for activity in self._read_text(dictionary)[0]:
                    save_delphi(activity, self.out, model_name=str(self.subject), reads=dictionary.reads)
            case "neuronpedia":
                self._save_neuronpedia(dictionary)
        give(self.out)

    def _save_saelens(self, dictionary: Dictionary) -> None:
        n_flat = n_flat_dictionaries(dictionary)
        for group in range(n_flat):
            folder = self.out if n_flat == 1 else self.out / f"layer-{group}"
            save_saelens(dictionary, folder, group=group, raw_inputs=self.raw_inputs)

    def _save_neuronpedia(self, dictionary: Dictionary) -> None:
        prepared = PreparedTokens.load(self.tokens_folder) if self.tokens_folder is not None else None
        model_id = self.model_id or Path(str(self.subject)).name
        origin = None if prepared is None else prepared.held_out.origin
        dataset = "" if origin is None or origin.text is None else origin.text.source
        release = Release(model=model_id, set_name=self.release, creator=self.creator, dataset=dataset)
        activities, model = self._read_text(dictionary)
        assert prepared is not None
        save_neuronpedia(
            dictionary, activities, self.out, release, tokenizer=prepared.tokenizer, unembed=unembedding(model)
        )

    def _read_text(self, dictionary: Dictionary) -> tuple[list[Activity], Any]:
        """Where features are active in the held-out text of the tokens folder, and the model."""
        dictionary.require_input_scale(f"the {self.format} format", raw_inputs=self.raw_inputs)
        if self.subject is None or self.tokens_folder is None:
            raise ValueError(f"--format {self.format} reads text with a model: give --subject and --tokens-folder")
        reads = dictionary.reads
        if reads is None or reads.site not in ("residual", "write"):
            raise ValueError(
                f"--format {self.format} reads a residual stream or what blocks write to it; the dictionary reads "
                f"{reads or 'what nobody says: convert it with --sites'}"
            )
        tokens = TokenBlocks.load(self.tokens_folder / "held_out")
        require_own_tokens(self.subject, tokens, revision=self.loading.revision)
        model = load_model(self.subject, **asdict(self.loading), device=self.device)
        origin = model_origin(model, self.subject, self.loading.revision)
        given: dict[str, Any] = {"max_tokens": self.max_tokens, "blocks_path": self.blocks_path, "origin": origin}
        source = source_of(dictionary, model, tokens, **given)
        stream = source.train
        assert isinstance(stream, ActivationStream)
        return collect_activity(dictionary.to(self.device), source, tokens, stream.blocks, device=self.device), model
