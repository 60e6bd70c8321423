"""Planted pairs of subjects of which every leg of the rule is known: what is planted, and each training's own draw.

A pair is a deep, narrow A of L layers of width D, and a shallow, wide B of L / 4 layers of width 2 D. Their features
are sparse, fire on the same tokens and have half-normal activations, so that what a dictionary loses falls smoothly as
its k grows. A training draws what is not the truth: directions, rates, coordinates' gains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from crosscoder.data.order import seeded_generator
from crosscoder.data.world import PlantedSource
from crosscoder.data.world_pair import DEPTH_RATIO, SIDES, WIDTH_RATIO, PairConfig, Side, WorldPair
from crosscoder.foundation.config import config as settings
from crosscoder.measure.counting import binary_entropy
from crosscoder.measure.dimension import effective_dimension

HELD_OUT_STREAM = 10**6
HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)
"""Of activations that are active; their mean square is 1."""
LARGEST_RATE = 0.5


@settings
class Plant:
    """A pair of known truth and what the rule should say of it.

    right: labels that are right. safe: further labels that are no wrong conclusion.
    gamma: a feature lasts L^gamma layers. crowding: directions lie in D L^-crowding dimensions of a layer, so that room
        grows as L^(1 - gamma - crowding).
    code: `windows`, or `words`: features of A are two letters, one in each of two neighbouring layers, with D letters a
        layer. B's features have directions of their own.
    load_ratio: B's features over A's in number. rate_ratio: B's firing rates over A's. shared: share of B's features
        that A has too. width_exponent: room grows as D^width_exponent; below 1 directions of B lie in fewer dimensions.
    data: `features`, or a Gaussian of their covariance.
    density, active: features a neuron of A, and of these active on a token. instruments: the same where dictionaries
        are trained, if other; `trained_as` names another plant whose dictionaries tell how far instruments are off.
    size: dictionary features over planted ones. k_factor: k over what the fidelity needs. k_more: further k, where one
        side is so crowded that the usual ones lose too much. noise: share of variance that is Gaussian noise.
    trainings: at most so many have dictionaries; two or more give intervals, three rates too, five a label.
    """

    name: str
    right: tuple[str, ...]
    safe: tuple[str, ...] = ("undecided", "not testable")
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    delta: float | None = None
    crowding: Annotated[float, Field(ge=0, lt=1)] = 0.0
    code: Literal["windows", "words"] = "windows"
    load_ratio: PositiveFloat = 1.0
    rate_ratio: PositiveFloat = 1.0
    shared: Annotated[float, Field(ge=0, le=1)] = 1.0
    width_exponent: float = 1.0
    data: Literal["features", "gaussian"] = "features"
    density: PositiveFloat = 4.0
    active: PositiveFloat = 10.0
    instruments: tuple[float, float] = (1.0, 4.0)
    trained_as: str | None = None
    size: PositiveFloat = 2.0
    k_factor: PositiveFloat = 1.0
    k_more: tuple[PositiveInt, ...] = ()
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    trainings: PositiveInt = 1
    bigram: bool = False
    """Features are token ids: the subject predicts no better than a table of tokens."""
    control_gamma: float = 0.95
    """How many layers a feature of an untrained subject lasts, as an exponent of L."""


@settings
class WorldSizes:
    """Sizes of a planted pair, and how much trainings vary.

    rate_sd: of ln of a feature's rate about its mean over trainings. load_sd,
    room_sd: of ln of all rates together, and of ln room, between trainings.
    """

    n_layers: Annotated[int, Field(ge=DEPTH_RATIO, multiple_of=DEPTH_RATIO)] = 4
    d_model: PositiveInt = 80
    rate_range: Annotated[float, Field(gt=1)] = 3.0
    rate_sd: NonNegativeFloat = 0.3
    load_sd: NonNegativeFloat = 0.08
    room_sd: NonNegativeFloat = 0.05

    def shape(self, side: Side) -> tuple[int, int]:
        """`(layers, width)` of A or B."""
        deep, narrow = self.n_layers, self.d_model
        return (deep, narrow) if side == "A" else (deep // DEPTH_RATIO, narrow * WIDTH_RATIO)

    def n_features(self, plant: Plant) -> int:
        """Features of A."""
        return round(plant.density * self.n_layers * self.d_model)


ROOM_LOSS = 0.12
"""Mean of what gains of coordinates take from ln room; they vary so that its sd is `room_sd`."""


@dataclass(frozen=True)
class Subject:
    """One training of A or B: its features' directions `[F, L, D]` and rates `[F]`, and which of all features they
    are."""

    side: Side
    decoder_FLD: Tensor
    probability_F: Tensor
    index_F: Tensor
    n_common: int
    """Features of A, whichever side this is: tokens are drawn for all of them."""
    noise: float
    seed: tuple[int, ...]

    @cached_property
    def scale(self) -> float:
        """One factor that makes the mean squared activation 1 in units of dictionaries."""
        square_F = self.decoder_FLD.flatten(1).square().sum(1)
        total = float((self.variance_F * square_F).sum()) / (1 - self.noise)
        return math.sqrt(self.decoder_FLD[0].numel() / total)

    @property
    def variance_F(self) -> Tensor:
        """Variance of each feature's activation."""
        return self.probability_F - (self.probability_F * HALF_NORMAL_MEAN).square()

    def draw(self, n: int, stream: int | str, index: int) -> Tensor:
        """`x_BLD` of `n` tokens; features of all subjects fire on the same tokens of a stream."""
        generator = seeded_generator("operating tokens", stream, index)
        shape = (n, self.n_common)
        uniform_BF, value_BF = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
        if bool((self.index_F >= self.n_common).any()):
            uniform_BF = torch.cat([uniform_BF, torch.rand(shape, generator=generator)], dim=1)
            value_BF = torch.cat([value_BF, torch.randn(shape, generator=generator)], dim=1)
        active_BF = (uniform_BF[:, self.index_F] < self.probability_F) * value_BF[:, self.index_F].abs()
        x_BN = self.scale * (active_BF @ self.decoder_FLD.flatten(1))
        if self.noise:
            own = seeded_generator("operating noise", self.side, *self.seed, stream, index)
            x_BN = x_BN + math.sqrt(self.noise) * torch.randn(x_BN.shape, generator=own)
        return x_BN.view(n, *self.decoder_FLD.shape[1:])

    def source(self, held_out_tokens: int) -> PlantedSource:
        """Tokens as dictionaries read them."""
        n_layers, d_model = self.decoder_FLD.shape[1:]
        return PlantedSource(
            self.draw,
            scale_L=torch.full((n_layers,), self.scale),
            d_model=d_model,
            held_out_stream=HELD_OUT_STREAM,
            held_out_tokens=held_out_tokens,
        )

    def letters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every layer the features that write there, and for each of them the first one in its direction."""
        for layer in range(self.decoder_FLD.shape[1]):
            rows_FD = self.decoder_FLD[:, layer]
            held_F = rows_FD.norm(dim=1) > 0
            unit_FD = F.normalize(rows_FD[held_F], dim=1)
            yield held_F, ((unit_FD @ unit_FD.T) > 1 - 1e-5).float().argmax(1)

    def letter_rates(self) -> np.ndarray:
        """How often each direction that single layers tell apart is written, all layers' one after another."""
        found = []
        for held_F, first_F in self.letters():
            silent_F = torch.zeros(len(first_F), dtype=torch.float64)
            silent_F.index_add_(0, first_F, torch.log1p(-self.probability_F[held_F].double()))
            found.append(1 - silent_F[first_F.unique()].exp())
        return torch.cat(found).numpy()


@dataclass(frozen=True)
class Truth:
    """ln load, ln of bank loads summed over layers, ln room, ln d_eff, ln causal layers, of one training's features;
    how many they are and their mean rate."""

    load: float
    bank: float
    room: float
    d_eff: float
    causal: float
    n_features: int
    rate: float


def truth_of(subject: Subject) -> Truth:
    """Of the features as drawn; room counts how few they are, and noise.

    A layer that cannot be told which feature of several fires still says that one does: a bank has one feature for each
    direction of a layer.
    """
    rows_FN = subject.decoder_FLD.flatten(1).double()
    energy_F = subject.variance_F.double()
    covariance_NN = (rows_FN * energy_F[:, None]).T @ rows_FN
    n_joint = len(covariance_NN)
    covariance_NN += torch.eye(n_joint) * float(covariance_NN.trace()) / n_joint * subject.noise / (1 - subject.noise)
    room = float(covariance_NN.trace() ** 2 / covariance_NN.square().sum())
    share_FL = subject.decoder_FLD.square().sum(2)
    share_FL = share_FL / share_FL.sum(1, keepdim=True)
    return Truth(
        load=math.log(binary_entropy(subject.probability_F.double().numpy()).sum()),
        bank=math.log(binary_entropy(subject.letter_rates()).sum()),
        room=math.log(room),
        d_eff=math.log(effective_dimension(subject.decoder_FLD.numpy())),
        causal=float(-share_FL.square().sum(1).log().mean()),
        n_features=len(share_FL),
        rate=float(subject.probability_F.mean()),
    )


def known_loads(subject: Subject, fvu: float, n_tokens: int = 12_288) -> tuple[float, float]:
    """ln loads, joint and of banks over all layers, of codes that know the features and drop the least energies until
    a fraction `fvu` of the variance is lost; what dictionaries could reach were directions orthogonal."""
    whole = replace(subject, noise=0.0, decoder_FLD=torch.eye(len(subject.decoder_FLD))[:, None])
    active_BF = whole.draw(n_tokens, "known", 0)[:, 0] / whole.scale
    norm_FL = subject.decoder_FLD.norm(dim=2)
    banks = []
    for layer, (held_F, first_F) in enumerate(subject.letters()):
        weight_F = norm_FL[held_F, layer]
        written_BF = torch.zeros(n_tokens, int(held_F.sum())).index_add_(1, first_F, active_BF[:, held_F] * weight_F)
        banks.append(_load_of_largest(written_BF, fvu))
    return math.log(_load_of_largest(active_BF * norm_FL.norm(dim=1), fvu)), math.log(sum(banks))


def _load_of_largest(active_BF: Tensor, fvu: float) -> float:
    energy_P = active_BF[active_BF > 0].double().square().sort().values
    lost = fvu * float(active_BF.double().var(0, correction=0).sum()) * len(active_BF)
    cut = energy_P[int(torch.searchsorted(energy_P.cumsum(0), lost).clamp(max=len(energy_P) - 1))]
    rate_F = (active_BF.double().square() >= cut).double().mean(0)
    return float(binary_entropy(rate_F.numpy()).sum())


def draw_subject(plant: Plant, sizes: WorldSizes, side: Side, *, world: int, training: int) -> Subject:
    """One training of one side in one world.

    Trainings with one `world` have the same features with the same mean rates.
    """
    n_features = sizes.n_features(plant)
    generator = seeded_generator("operating world", world)
    rate_F = sizes.rate_range ** torch.rand(2 * n_features, generator=generator)
    rate_F *= plant.active / float(rate_F[:n_features].sum())
    index_F = _features_of(plant, side, n_features)
    own = seeded_generator("operating training", world, side, training)
    jitter_F = torch.exp(sizes.rate_sd * torch.randn(2 * n_features, generator=own))
    jitter = math.exp(sizes.load_sd * float(torch.randn(1, generator=own)))
    ratio = plant.rate_ratio if side == "B" else 1.0
    probability_F = (rate_F * jitter_F)[index_F]
    probability_F = probability_F * float(rate_F[index_F].sum() / probability_F.sum()) * jitter * ratio
    decoder_FLD = _directions(plant, sizes, side, len(index_F), world, training)
    loss = ROOM_LOSS * math.exp(sizes.room_sd / ROOM_LOSS * float(torch.randn(1, generator=own)))
    gain_LD = torch.exp(math.sqrt(loss) / 2 * torch.randn(decoder_FLD.shape[1:], generator=own))
    return Subject(
        side=side,
        decoder_FLD=decoder_FLD * gain_LD,
        probability_F=probability_F.clamp(max=LARGEST_RATE),
        index_F=index_F,
        n_common=n_features,
        noise=plant.noise,
        seed=(world, training),
    )


def _features_of(plant: Plant, side: Side, n_features: int) -> Tensor:
    """A has the first ones; B `load_ratio` as many, of which a share are A's and the others its own."""
    if side == "A":
        return torch.arange(n_features)
    n = round(plant.load_ratio * n_features)
    n_shared = round(plant.shared * n)
    return torch.cat([torch.arange(n_shared), n_features + torch.arange(n - n_shared)])


def _directions(plant: Plant, sizes: WorldSizes, side: Side, n: int, world: int, training: int) -> Tensor:
    """Directions `[n, L, D]`, each of norm 1 over all layers."""
    n_layers, d_model = sizes.shape(side)
    if plant.code == "words" and n_layers > 1:
        return word_directions(n, n_layers, d_model, seeded_generator("operating words", world, side, training))
    width = sizes.d_model
    if side == "B" and plant.width_exponent != 1:
        width = round(width * WIDTH_RATIO ** (plant.width_exponent - 1))
    words = plant.code == "words"
    config = PairConfig(
        n_features=n,
        n_layers=sizes.n_layers,
        d_model=width,
        gamma=0.0 if words else plant.gamma,
        delta=None if words else plant.delta,
        crowding=plant.crowding,
        seed=world,
    )
    pair = _pair(config)
    if pair.cosine[side] < 1:  # features turn from layer to layer
        pair = _pair(replace(config, training_seed=1 + training))
        return F.pad(pair.decoder_FLD[side], (0, d_model - pair.decoder_FLD[side].shape[2]))
    generator = seeded_generator("operating directions", world, side, training)
    unit_ND = F.normalize(torch.randn(n, config.rank(side), generator=generator), dim=1)
    norm_NL = pair.decoder_FLD[side].norm(dim=2)
    return F.pad(norm_NL[:, :, None] * unit_ND[:, None, :], (0, d_model - config.rank(side)))


@lru_cache(maxsize=16)
def _pair(config: PairConfig) -> WorldPair:
    """Whose windows trainings share."""
    return WorldPair(config)


def word_directions(n: int, n_layers: int, d_model: int, generator: torch.Generator) -> Tensor:
    """`n` features of two letters, in layers 2 j and 2 j + 1, with `d_model` letters a layer, `[n, L, D]`.

    Letters of a pair of layers are all combined with all, as evenly as n allows.

    Raises:
        ValueError: there are not as many words.
    """
    n_pairs = n_layers // 2
    if n > n_pairs * d_model**2:
        raise ValueError(f"{n_layers} layers of {d_model} letters have {n_pairs * d_model**2} words, fewer than {n}")
    letter_LAD = F.normalize(torch.randn(n_layers, d_model, d_model, generator=generator), dim=2)
    rows_NLD = torch.zeros(n, n_layers, d_model)
    for pair in range(n_pairs):
        member_M = torch.arange(pair, n, n_pairs)
        # Diagonals of the square of words one after another: every letter is as frequent as the others.
        place_M = torch.arange(len(member_M))
        first_M, second_M = place_M % d_model, (place_M + place_M // d_model) % d_model
        rows_NLD[member_M, 2 * pair] = letter_LAD[2 * pair, first_M]
        rows_NLD[member_M, 2 * pair + 1] = letter_LAD[2 * pair + 1, second_M]
    return rows_NLD / math.sqrt(2)


def as_trained(plant: Plant) -> Plant:
    """The plant at the density at which dictionaries are trained on it."""
    density, active = plant.instruments
    return replace(plant, density=density, active=active)


def untrained(plant: Plant) -> Plant:
    """The untrained control: the text's own features, each over nearly all layers."""
    return replace(plant, gamma=plant.control_gamma, crowding=0.0, code="windows")


def subjects(plant: Plant, sizes: WorldSizes, *, world: int, training: int) -> dict[Side, Subject]:
    """Both sides of one training."""
    return {side: draw_subject(plant, sizes, side, world=world, training=training) for side in SIDES}
