"""A dictionary as something that is kept: in a folder, on the Hub, with a card."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from crosscoder.dictionary.card import Facts, ModelCard, is_own_card, is_stale_card
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.dictionary.saved import FILES, SCHEMA, Saved, Shapes, read_saved, tensors_sha256, write_saved
from crosscoder.dictionary.weights import Weights
from crosscoder.foundation.artifact import MANIFEST, committed_directory, replace_file
from crosscoder.foundation.console import say
from crosscoder.foundation.damage import reading
from crosscoder.foundation.hub import CARD, local_folder, upload_folder
from crosscoder.foundation.origin import Reads
from crosscoder.foundation.tensors import Streamed


class Kept(Weights):
    """Weights with a record of what they read (`reads`, None where nobody told it) and of what was `frozen`."""

    reads: Reads | None = None
    frozen: str = "none"

    @staticmethod
    @abstractmethod
    def forms() -> Mapping[str, Any]:
        """The classes that files may name."""

    def write_files(self, folder: Path, tensors: Mapping[str, Tensor | Streamed] | None = None) -> None:
        """Write config and weights as plain files into `folder`, which the caller commits; `tensors`: all ranks'."""
        if tensors is None:
            self.require_whole()
            tensors = self.state_dict()
        write_saved(Saved(type(self).__name__, self.config, tensors, self.reads, self.frozen), folder)

    def save_pretrained(self, folder: str | Path, *, card: ModelCard | None = None) -> None:
        """Write config and weights to `folder`, whole or not at all; other files there, such as a README, stay, and one
        of the same name that is not an older dictionary's is a FileExistsError.

        card: what `README.md` says beside them, in the place of one that is there; None writes none.
        """
        text = None if card is None else card.text(self.facts())
        with committed_directory(folder, schema=SCHEMA, files=FILES) as temporary:
            self.write_files(temporary)
        if text is not None:
            replace_file(Path(folder) / CARD, text.encode())
        else:
            note_stale_card(Path(folder), self)

    def push_to_hub(
        self,
        repo: str,
        *,
        card: ModelCard | str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        replace_card: bool = False,
        message: str = "A dictionary by crosscoder",
    ) -> str:
        """Upload config, weights, manifest and card to `organisation/repository`, as one commit; returns its address.

        The repository is made if there is none, and what else it holds stays.

        card: what `README.md` says, or its text. None: what the dictionary's record tells, and that nothing was
            measured. A README that others wrote stays, unless `replace_card`.
        private: whether a new repository is. One that is there and is not as asked is refused before any upload.
        revision: the branch, made if there is none; None: main. token: of an account; None: that of `hf auth login`.

        Raises:
            ValueError: `repo` is no such name, the dictionary cannot be read again (its weights are not finite), the
                card is of another dictionary, or the repository's visibility differs.
            OSError: the Hub refuses, or cannot be reached; nothing was uploaded.
        """
        text = (
            card if isinstance(card, str) else (card or ModelCard()).text(self.facts(), repo=repo, subfolder=subfolder)
        )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "dictionary"
            self.save_pretrained(folder)
            type(self).from_pretrained(folder)
            replace_file(folder / CARD, text.encode())
            return upload_folder(
                folder, repo, private=private, revision=revision, subfolder=subfolder, token=token, message=message,
                may_replace_card=None if replace_card else is_own_card,
            )  # fmt: skip

    def facts(self) -> Facts:
        """What a card or an evaluation says of this dictionary, the hash of its weights included."""
        self.require_whole()
        weights = tensors_sha256(self.state_dict())
        return Facts(type(self).__name__, self.config, weights, reads=self.reads, frozen=self.frozen)

    @classmethod
    def from_pretrained(
        cls,
        where: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
    ) -> Self:
        """The dictionary in a folder or a repository on the Hub, for evaluation; `Dictionary` itself reads both forms.

        where: a folder, or `organisation/repository`, of which the revision (a branch, tag or commit) is read. One
            without our manifest is loaded if its files agree with each other, and it is said that nobody checked them.
        subfolder: of either. token: of an account that may read the repository; None: that of `hf auth login`.

        Raises:
            FileNotFoundError: there is no dictionary there.
            DamagedArtifactError: a file fails its check, or a tensor is missing, misshapen or not finite.
            ValueError: the folder holds another class of dictionary.
        """
        names = (*FILES, MANIFEST)
        folder = local_folder(where, files=names, revision=revision, subfolder=subfolder, token=token)

        def shapes(name: str, config: DictionaryConfig) -> Shapes:
            form = cls.forms().get(name)
            if form is None or not issubclass(form, cls):
                raise ValueError(f"{folder} holds a {name:.80}, not a {cls.__name__}; load it as a {name:.80}")
            return form.tensor_shapes(config)

        saved = read_saved(folder, where, shapes)
        with reading(folder):
            dictionary = cls.forms()[saved.form](**saved.config.settings())
            dictionary.load_state_dict(dict(saved.tensors))
        dictionary.reads, dictionary.frozen = saved.reads, saved.frozen
        assert isinstance(dictionary, cls)
        return dictionary.eval()


def note_stale_card(folder: Path, dictionary: Kept) -> None:
    """Say where the card of a folder is of other weights than those of a dictionary."""
    if is_stale_card(folder / CARD, lambda: dictionary.facts().weights):
        say(f"note: {folder / CARD} is the card of other weights; write it again by `crosscoder card`")
