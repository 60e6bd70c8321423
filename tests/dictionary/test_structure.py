"""Structures: which layers a feature reads and writes, what then counts as error, and the symmetries between them."""

import json

import numpy as np
import pytest
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, ReLU, TopK, load_dictionary
from crosscoder.dictionary import (
    Acausal,
    DictionaryConfig,
    Diffing,
    LocalWindow,
    NormPenalty,
    StrictlyCausal,
    Transcoder,
    WeaklyCausal,
    stack_subjects,
)
from crosscoder.dictionary.losses import loss_terms
from crosscoder.foundation.artifact import read_json, write_json
from crosscoder.foundation.config import from_mapping, to_mapping
from crosscoder.measure.reading import measure_dictionary
from crosscoder.training import TrainConfig, train
from tests.dictionary.structures import EVERY, FIRST_WRITTEN, D, F, L, batches_of, inputs, make, masks
from tests.dictionary.test_pretrained import reseal


def test_masks_of_a_small_crosscoder_by_hand():
    def table(structure, n_layers, n_features):
        config = DictionaryConfig(
            n_layers=n_layers, d_model=2, n_features=n_features, sparsity=TopK(k=1), structure=structure
        )
        read, write = config.masks()
        return [["".join("x" if on else "." for on in row) for row in mask[:, :, 0]] for mask in (read, write)]

    assert table(WeaklyCausal(), 3, 4) == [["x..", ".x.", "..x", "x.."], ["xxx", ".xx", "..x", "xxx"]]
    assert table(StrictlyCausal(), 3, 3) == [["x..", ".x.", "x.."], [".xx", "..x", ".xx"]]
    assert table(LocalWindow(2), 3, 3) == [["xx.", ".xx", "xx."]] * 2
    assert table(Transcoder(), 4, 3) == [["x...", ".x..", "x..."], ["..xx", "...x", "..xx"]]
    assert DictionaryConfig(n_layers=3, d_model=2, n_features=4, sparsity=TopK(k=1)).masks() is None


def test_masks_of_two_subjects_by_hand():
    structure = Diffing(n_layers=(2, 1), d_models=(2, 1), dedicated=(0.25, 0.25))
    assert sorted(structure.owners(8).tolist()) == [-1] * 4 + [0, 0, 1, 1]
    assert sorted(structure.owners(8)[:4].tolist()) == [-1, -1, 0, 1]  # in turns, so also in a prefix
    config = DictionaryConfig(n_layers=3, d_model=2, n_features=8, sparsity=TopK(k=1), structure=structure)
    read, write = config.masks()
    assert torch.equal(read, write)
    for owner, mask_LD in zip(structure.owners(8).tolist(), read.tolist(), strict=True):
        first, second = [[owner != 1] * 2] * 2, [owner != 0, False]
        assert mask_LD == [*first, second]
    assert config.n_written() == 5


@EVERY
@pytest.mark.parametrize("sparsity", [TopK(k=5), BatchTopK(k=5), JumpReLU(0.6), ReLU()], ids=lambda s: type(s).__name__)
def test_sparse_path_equals_dense_path_and_gradients_stay_inside(structure, sparsity):
    cc = make(structure, sparsity=sparsity, decoder="free")
    x = inputs(60)
    read, write = masks(cc)
    out, dense = cc(x), cc.encode_dense(x)
    torch.testing.assert_close(out.code.to_dense(), dense)
    recon = torch.einsum("bf,fld->bld", dense, cc.decoder * write) + cc.decoder_bias
    torch.testing.assert_close(out.recon, recon)
    weights = [cc.encoder, cc.decoder]
    found = torch.autograd.grad((out.recon - x).square().sum(), weights)
    wanted = torch.autograd.grad((recon - x).square().sum(), weights)
    for grad, expected, mask in zip(found, wanted, (read, write), strict=True):
        torch.testing.assert_close(grad, expected)
        assert grad[~mask].eq(0).all()
        assert grad[mask].ne(0).float().mean() > 0.5


@EVERY
def test_weights_start_inside_the_masks_with_unit_rows(structure):
    cc = Crosscoder(n_layers=L, d_model=D, n_features=F, sparsity=TopK(k=5), structure=structure)
    for weight, mask in zip((cc.encoder, cc.decoder), masks(cc), strict=True):
        assert weight[~mask].eq(0).all()
        assert weight[mask].ne(0).all()
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.ones(F))


@EVERY
def test_loss_counts_the_layers_that_are_written(structure):
    cc = make(structure, sparsity=ReLU(NormPenalty("l2", 0.7)), prefixes=(0.5,), decoder="free")
    structure_widths = [6, 6, 6, 4] if isinstance(structure, Diffing) else [D] * L
    first = FIRST_WRITTEN.get(structure, 0)
    x = inputs(30)
    with torch.no_grad():
        for layer, width in enumerate(structure_widths):
            x[:, layer, width:] = 0
            cc.decoder_bias[layer, width:] = 0
    n_numbers = 30 * sum(structure_widths[first:])
    out = cc(x)
    terms = loss_terms(cc, x).terms
    error = (out.recon - x)[:, first:].square().sum() / n_numbers
    torch.testing.assert_close(terms["recon"], error / 2)
    norms = (cc.decoder * masks(cc)[1]).flatten(1).norm(dim=1)
    charge = 0.7 * (out.code.to_dense() * norms).sum() / n_numbers
    torch.testing.assert_close(terms["penalty"], charge)
    with torch.no_grad():
        half = cc.decode(out.code.prefix(F // 2))
    torch.testing.assert_close(terms["recon_prefixes"], (half - x)[:, first:].square().sum() / n_numbers / 2)


@EVERY
def test_explained_variance_counts_the_layers_that_are_written(structure):
    cc = make(structure).eval()
    x = inputs(200)
    first = FIRST_WRITTEN.get(structure, 0)
    measured = measure_dictionary(cc, x.split(64))
    error = (cc(x).recon.detach() - x).square().sum((0, 2)).numpy()
    variance = (x - x.mean(0)).square().sum((0, 2)).numpy()
    assert np.isnan(measured.explained_variance_L[:first]).all()
    np.testing.assert_allclose(measured.explained_variance_L[first:], 1 - error[first:] / variance[first:])
    assert measured.explained_variance == pytest.approx(1 - error[first:].sum() / variance[first:].sum())
    result = train(make(structure), [x], quiet=True)
    expected = (
        loss_terms(make(structure), x).error_BLD[:, first:].square().sum((0, 2)).numpy() / variance[first:]
    ).mean()
    assert result.metrics[0]["explained_variance"] == pytest.approx(1 - expected)


@EVERY
def test_round_trip_by_mapping_and_by_folder(structure, tmp_path):
    cc = make(structure, sparsity=JumpReLU(0.5), initial="same").float()
    assert from_mapping(DictionaryConfig, to_mapping(cc.config)) == cc.config
    cc.save_pretrained(tmp_path / "saved")
    again = load_dictionary(tmp_path / "saved")
    assert again.config == cc.config
    assert again.state_dict().keys() == Crosscoder.tensor_shapes(cc.config).keys()
    x = inputs(9).float()
    assert torch.equal(again(x).recon, cc.eval()(x).recon)


def test_a_config_written_before_structures_existed_still_loads(tmp_path):
    cc = make(Acausal()).float()
    cc.save_pretrained(tmp_path / "saved")
    config = read_json(tmp_path / "saved" / "config.json")
    for key in ("structure", "initial", "shared"):
        del config["settings"][key]
    write_json(tmp_path / "saved" / "config.json", config)
    reseal(tmp_path / "saved")
    assert load_dictionary(tmp_path / "saved").config == cc.config
    assert json.loads(json.dumps(to_mapping(cc.config)))["structure"] == {"kind": "Acausal"}


def test_windows_of_one_layer_are_a_bank_where_features_are_chosen_by_themselves():
    cc = make(LocalWindow(1), sparsity=JumpReLU(0.3))
    bank = LayerwiseSAE(n_layers=L, d_model=D, n_features=F // L, sparsity=JumpReLU(0.3)).double()
    with torch.no_grad():
        bank.decoder_bias.copy_(cc.decoder_bias)
        for layer in range(L):
            own = torch.arange(layer, F, L)
            bank.encoder[layer], bank.decoder[layer] = cc.encoder[own, layer], cc.decoder[own, layer]
            bank.encoder_bias[layer], bank.log_threshold[layer] = cc.encoder_bias[own], cc.log_threshold[own]
    x = inputs(50)
    torch.testing.assert_close(cc(x).recon, bank(x).recon)
    ours = cc.encode(x).to_dense().view(50, F // L, L)
    torch.testing.assert_close(ours.transpose(1, 2), bank.encode(x).to_dense())
    torch.testing.assert_close(loss_terms(cc, x).terms["recon"], loss_terms(bank, x).terms["recon"])


@pytest.mark.parametrize(
    ("structure", "changed", "same", "different"),
    [
        (WeaklyCausal(), 1, [0], [1, 2, 3]),
        (WeaklyCausal(), 3, [0, 1, 2], [3]),
        (StrictlyCausal(), 1, [0, 1], [2, 3]),
        (StrictlyCausal(), 3, [0, 1, 2, 3], []),
        (LocalWindow(2), 0, [2, 3], [0, 1]),
        (LocalWindow(2), 1, [3], [0, 1, 2]),
        (Transcoder(), 1, [0, 1, 2], [3]),
        (Transcoder(), 0, [0, 1], [2, 3]),
        (Transcoder(), 2, [0, 1, 2, 3], []),
        (Acausal(), 3, [], [0, 1, 2, 3]),
        (Diffing((3, 1), (6, 6), (0.5, 0.5)), 3, [0, 1, 2], [3]),
        (Diffing((3, 1), (6, 6), (0.5, 0.25)), 3, [], [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_what_depends_on_what(structure, changed, same, different):
    cc = make(structure, sparsity=ReLU())
    x = inputs(20)
    before = cc(x).recon
    x[:, changed] += 1.0
    moved = (cc(x).recon - before).abs().amax((0, 2))
    assert moved[same].eq(0).all()
    assert moved[different].gt(1e-3).all()


def test_a_subject_beside_itself_is_written_alike():
    cc = Crosscoder(
        n_layers=2 * L, d_model=D, n_features=F, sparsity=TopK(k=4), structure=Diffing((L, L), (D, D)), initial="same"
    ).double()
    data = [stack_subjects([x.double(), x.double()]) for x in batches_of(Acausal(), 40)]
    train(cc, data, config=TrainConfig(learning_rate=1e-2), quiet=True)
    torch.testing.assert_close(cc.decoder[:, :L], cc.decoder[:, L:])
    torch.testing.assert_close(cc(data[0]).recon[:, :L], cc(data[0]).recon[:, L:])
    assert not torch.allclose(cc.decoder[:, 0], cc.decoder[:, 1])


def test_subjects_are_stacked_with_zeros_at_the_end():
    a, b = inputs(3, n_layers=2, d_model=4), inputs(3, n_layers=1, d_model=6)
    x = stack_subjects([a, b])
    assert x.shape == (3, 3, 6)
    assert torch.equal(x[:, :2, :4], a)
    assert x[:, :2, 4:].eq(0).all()
    assert torch.equal(x[:, 2:], b)
    for wrong in ([], [a, b[:2]], [a[0]]):
        with pytest.raises(ValueError, match="with the same B tokens"):
            stack_subjects(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "weakly_causal"}, "structure is 'weakly_causal'; expected an instance of Acausal or"),
        ({"structure": StrictlyCausal(), "n_layers": 1}, "StrictlyCausal needs a layer to read and a later one"),
        ({"structure": LocalWindow(5)}, "window of 5 layers does not fit n_layers = 4"),
        ({"structure": Transcoder(), "n_layers": 3}, "n_layers is 3, expected an even number"),
        ({"structure": Diffing((2, 1), (6, 4))}, r"subjects have \(2, 1\) layers of width \(6, 4\), the dictionary"),
        ({"structure": Diffing((2, 2), (4, 4))}, "expected their sum and their largest"),
        ({"structure": WeaklyCausal(), "n_features": 3, "sparsity": TopK(k=1)}, "over 4 layers; n_features is 3"),
        ({"initial": "zero"}, "initial is 'zero'; expected 'independent' or 'same'"),
        ({"shared": True}, "shared=True is for a LayerwiseSAE"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Crosscoder(**{"n_layers": L, "d_model": D, "n_features": F, "sparsity": TopK(k=2), **settings})


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: LocalWindow(0), "width is 0; expected a number greater than 0"),
        (lambda: Diffing((2, 1), (4,)), "expected one number of each"),
        (lambda: Diffing((2, 1), (4, 4), (0.1,)), "dedicated has 1 shares for 2 subjects"),
        (lambda: Diffing((2, 1), (4, 4), (0.7, 0.7)), "that sum to at most 1"),
        (lambda: LayerwiseSAE(n_layers=2, d_model=4, n_features=40, structure=WeaklyCausal()), "is for a Crosscoder"),
    ],
)
def test_wrong_structures_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
