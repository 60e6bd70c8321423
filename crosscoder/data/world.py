"""A world whose features are known: sparse, each with planted directions in some layers, and what it is mixed with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, get_args

import torch
from einops import rearrange
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from crosscoder.data.order import seeded_generator
from crosscoder.data.sources import EVALUATION_BATCH, Marked, Source
from crosscoder.foundation.config import config

Kind = Literal["local", "persistent", "drifting", "split", "gated"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Probability = Annotated[float, Field(ge=0, le=1)]
GATED_GROUP = 4  # two first halves times two second halves


@config
class Firing:
    """How often features fire, and which of them together. A group is `group` features with neighbouring ids.

    law: probabilities between p_min and p_max, log-uniform or Zipf (p_max * rank^-s, with p_min at the last rank).
    dependence: `correlated` gives the members of a group latent Gaussians with correlation `strength` (a Gaussian
        copula); `hierarchical` makes the first a parent and the others its children, which fire with probability
        `strength` where it does and never elsewhere; `exclusive` lets at most one of a group fire at a time.

    Probabilities stay as drawn, except that a child's is `strength` times its parent's.
    """

    law: Literal["log-uniform", "zipf"] = "log-uniform"
    dependence: Literal["independent", "correlated", "hierarchical", "exclusive"] = "independent"
    strength: Probability = 0.5
    group: Annotated[int, Field(ge=2)] = 2


@config
class Nuisance:
    """What is in the activations besides sparse features, and is not part of the truth.

    n_circles, circle_probability: each circle, when it is there, adds a point of a unit circle in a plane of all
        layers together, at a uniform angle.
    """

    n_circles: NonNegativeInt = 0
    circle_probability: Probability = 0.05


@config
class WorldConfig:
    """The planted features.

    A `local` feature lives in one layer; a `persistent` one keeps its direction through a window of neighbouring
    layers; a `drifting` one turns at each layer of its window so that neighbours have cosine `drift_cosine`.
    A `split` one is a word of a product code: one atom a layer, each shared with other split features, any two of
    which share at most one. A `gated` one is half in one layer and half in the next: four of them combine two first
    and two second halves. It takes two layers to tell split or gated features apart.
    """

    n_features: PositiveInt = 64
    n_layers: PositiveInt = 4
    d_model: Annotated[int, Field(ge=2)] = 16
    """At least 2, so that directions can turn."""
    kinds: tuple[Kind, ...] = ("local", "persistent", "drifting")
    p_min: Annotated[float, Field(gt=0)] = 0.01
    p_max: Probability = 0.05
    drift_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.8
    equal_energy: bool = True
    """True: a feature's squared norms sum to 1 over layers. False: its norm is 1 wherever it lives."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise on every activation."""
    seed: int = 0
    firing: Firing = Firing()
    nuisance: Nuisance = Nuisance()

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError(f"there are no kinds of features; expected some of {', '.join(KINDS)}")
        if self.n_layers == 1 and set(self.kinds) != {"local"}:
            raise ValueError("with one layer every feature is local; use kinds=('local',) or more layers")
        check_probabilities(self.firing, self.p_min, self.p_max)


class World:
    """The truth (`decoder_FLD`, `probability_F`, `kind_F` into `config.kinds`) and samples of it."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        generator = seeded_generator("world", config.seed)
        self.kind_F = torch.arange(config.n_features) % len(config.kinds)
        quantile_F = torch.rand(config.n_features, generator=generator)
        self.probability_F = firing_probabilities(quantile_F, config.p_min, config.p_max, config.firing)
        decoder_FLD = torch.zeros(config.n_features, config.n_layers, config.d_model)
        for feature, index in enumerate(self.kind_F.tolist()):
            if config.kinds[index] in ("local", "persistent", "drifting"):
                decoder_FLD[feature] = self._window(config.kinds[index], generator)
        # Streams of their own: the features drawn above do not depend on which other kinds there are.
        for kind, draw in (("split", split_profiles), ("gated", gated_profiles)):
            if kind in config.kinds:
                chosen_F = torch.tensor([config.kinds[index] == kind for index in self.kind_F.tolist()])
                own = seeded_generator(f"world {kind}", config.seed)
                decoder_FLD[chosen_F] = draw(int(chosen_F.sum()), config.n_layers, config.d_model, own)
        if config.equal_energy:
            decoder_FLD = decoder_FLD / decoder_FLD.flatten(1).norm(dim=1)[:, None, None]
        self.decoder_FLD = decoder_FLD
        self._circles_C2LD = self._circle_planes()

    @property
    def rho_F(self) -> Tensor:
        """How many layers each feature occupies: the width of its window, over which its norm is even."""
        return (self.decoder_FLD.norm(dim=2) > 0).sum(1).float()

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`(x_BLD, activations_BF)` of `n` tokens: active features are uniform in [0.7, 1.3]."""
        activations_BF = draw_activations(n, self.probability_F, self.config.firing, generator)
        x_BLD = torch.einsum("bf,fld->bld", activations_BF, self.decoder_FLD)
        if self.config.noise:
            x_BLD = x_BLD + self.config.noise * torch.randn(x_BLD.shape, generator=generator, device=x_BLD.device)
        if len(self._circles_C2LD):
            x_BLD = x_BLD + self._circle_points(n, generator)
        return x_BLD, activations_BF

    def draw(self, n: int, stream: int | str, index: int) -> Tensor:
        """`x_BLD` of `n` tokens, a pure function of the arguments."""
        return self.sample(n, self.generator("world batch", stream, index))[0]

    def generator(self, *parts: int | str) -> torch.Generator:
        """A generator on the device of the world that depends on `parts` only."""
        device = self.decoder_FLD.device
        return torch.Generator(device).manual_seed(seeded_generator(*parts).initial_seed())

    def to(self, device: torch.device | str) -> World:
        """This world, its truth moved to `device`; a seed draws other tokens on a GPU than on a CPU."""
        self.decoder_FLD, self.probability_F = self.decoder_FLD.to(device), self.probability_F.to(device)
        self._circles_C2LD = self._circles_C2LD.to(device)
        return self

    def _window(self, kind: Kind, generator: torch.Generator) -> Tensor:
        """One feature's direction at every layer, `[L, D]`: unit norm inside its window, zero outside."""
        config = self.config
        width = 1 if kind == "local" else _integer(2, config.n_layers, generator)
        first = _integer(0, config.n_layers - width, generator)
        cosine = config.drift_cosine if kind == "drifting" else None
        return window_profile(config.n_layers, config.d_model, first, width, cosine, generator)

    def _circle_planes(self) -> Tensor:
        """Orthonormal pairs `[C, 2, L, D]`, the planes of the circles."""
        n_circles, n_layers, d_model = self.config.nuisance.n_circles, self.config.n_layers, self.config.d_model
        generator = seeded_generator("world nuisance", self.config.seed)
        planes_CN2 = torch.randn(n_circles, n_layers * d_model, 2, generator=generator)
        if n_circles:
            planes_CN2 = torch.linalg.qr(planes_CN2).Q
        return rearrange(planes_CN2, "c (l d) p -> c p l d", l=n_layers)

    def _circle_points(self, n: int, generator: torch.Generator) -> Tensor:
        shape = (n, len(self._circles_C2LD))
        device = generator.device
        there_BC = torch.rand(shape, generator=generator, device=device) < self.config.nuisance.circle_probability
        angle_BC = 2 * math.pi * torch.rand(shape, generator=generator, device=device)
        point_BC2 = there_BC[..., None] * torch.stack([angle_BC.cos(), angle_BC.sin()], dim=2)
        return torch.einsum("bcp,cpld->bld", point_BC2, self._circles_C2LD)


def check_probabilities(firing: Firing, p_min: float, p_max: float) -> None:
    """Refuses a range that is upside down, and groups of which at most one may fire but whose sum can exceed 1."""
    if p_min > p_max:
        raise ValueError(f"expected p_min <= p_max, got {p_min} and {p_max}")
    if firing.dependence == "exclusive" and firing.group * p_max > 1:
        raise ValueError(
            f"{firing.group} exclusive features with p_max = {p_max} can sum to more than 1; "
            "expected group * p_max <= 1"
        )


def firing_probabilities(quantile_F: Tensor, p_min: float, p_max: float, firing: Firing) -> Tensor:
    """Each feature's firing probability, from where it stands (0 to 1) in the distribution of `firing`."""
    n_features = len(quantile_F)
    if firing.law == "log-uniform":
        probability_F = p_min * (p_max / p_min) ** quantile_F
    else:
        rank_F = 1 + quantile_F.argsort(descending=True).argsort()
        exponent = math.log(p_max / p_min) / math.log(n_features) if n_features > 1 else 0.0
        probability_F = p_max * rank_F.to(quantile_F.dtype) ** -exponent
    if firing.dependence == "hierarchical":
        parent_F = _first_of_group(n_features, firing.group)
        is_child_F = parent_F != torch.arange(n_features)
        probability_F = torch.where(is_child_F, firing.strength * probability_F[parent_F], probability_F)
    return probability_F


def draw_activations(n: int, probability_F: Tensor, firing: Firing, generator: torch.Generator) -> Tensor:
    """Activations `[n, F]` on the generator's device: 0, or uniform in [0.7, 1.3] where the feature fires."""
    active_BF = _draw_active(n, probability_F, firing, generator)
    return active_BF * (0.7 + 0.6 * torch.rand(active_BF.shape, generator=generator, device=generator.device))


def _draw_active(n: int, probability_F: Tensor, firing: Firing, generator: torch.Generator) -> Tensor:
    n_features, device = len(probability_F), generator.device
    shape = (n, n_features)
    first_F = _first_of_group(n_features, firing.group).to(device)
    group_F = first_F // firing.group
    match firing.dependence:
        case "independent":
            return torch.rand(shape, generator=generator, device=device) < probability_F
        case "correlated":
            shared_BF = torch.randn(n, int(group_F[-1]) + 1, generator=generator, device=device)[:, group_F]
            own_BF = torch.randn(shape, generator=generator, device=device)
            latent_BF = math.sqrt(firing.strength) * shared_BF + math.sqrt(1 - firing.strength) * own_BF
            return torch.special.ndtr(latent_BF) < probability_F
        case "hierarchical":
            is_child_F = first_F != torch.arange(n_features, device=device)
            own_F = probability_F.masked_fill(is_child_F, firing.strength)
            willing_BF = torch.rand(shape, generator=generator, device=device) < own_F
            return willing_BF & willing_BF[:, first_F]
        case "exclusive":
            # One number for the whole group; each member owns an interval as long as its probability.
            uniform_BF = torch.rand(n, int(group_F[-1]) + 1, generator=generator, device=device)[:, group_F]
            padded_F = F.pad(probability_F, (0, -n_features % firing.group))
            upper_GM = padded_F.view(-1, firing.group).cumsum(1)
            lower_GM = F.pad(upper_GM[:, :-1], (1, 0))
            upper_F, lower_F = upper_GM.flatten()[:n_features], lower_GM.flatten()[:n_features]
            return (uniform_BF < upper_F) & (uniform_BF >= lower_F)


def _first_of_group(n_features: int, group: int) -> Tensor:
    return torch.arange(n_features) // group * group


def window_profile(
    n_layers: int, d_model: int, first: int, width: int, cosine: float | None, generator: torch.Generator
) -> Tensor:
    """Unit directions in layers `first` to `first + width - 1`, `[L, D]`: one, or turning by `cosine` at each layer."""
    profile_LD = torch.zeros(n_layers, d_model)
    direction_D = F.normalize(torch.randn(d_model, generator=generator), dim=0)
    for layer in range(first, first + width):
        profile_LD[layer] = direction_D
        if cosine is not None:
            direction_D = _turned(direction_D, cosine, generator)
    return profile_LD


def split_profiles(n: int, n_layers: int, d_model: int, generator: torch.Generator) -> Tensor:
    """Words of a product code over atoms with unit norm, `[n, L, D]`."""
    word_NL, n_atoms = split_codewords(n, n_layers, generator)
    atoms_LAD = F.normalize(torch.randn(n_layers, n_atoms, d_model, generator=generator), dim=2)
    return atoms_LAD[torch.arange(n_layers), word_NL]


def split_codewords(n: int, n_layers: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """`n` different words `[n, L]`, any two with Hamming distance >= L - 1, and the number of letters q.

    A Reed-Solomon code: word (a, b) has letter a + b * l modulo q at layer l. Two such lines meet in one layer at
    most, because q is a prime not below L; it is also not below sqrt(n), so that there are words enough.
    """
    q = max(n_layers, math.isqrt(max(n - 1, 0)) + 1, 2)
    while any(q % divisor == 0 for divisor in range(2, math.isqrt(q) + 1)):
        q += 1
    chosen_N = torch.randperm(q * q, generator=generator)[:n]
    offset_N1, slope_N1 = (chosen_N // q)[:, None], (chosen_N % q)[:, None]
    return (offset_N1 + slope_N1 * torch.arange(n_layers)) % q, q


def gated_profiles(n: int, n_layers: int, d_model: int, generator: torch.Generator) -> Tensor:
    """First halves at one layer with second halves at the next, every pair of two and two, `[n, L, D]`."""
    profile_NLD = torch.zeros(n, n_layers, d_model)
    for start in range(0, n, GATED_GROUP):
        layer = _integer(0, n_layers - 2, generator)
        halves_22D = F.normalize(torch.randn(2, 2, d_model, generator=generator), dim=2)
        for member in range(min(GATED_GROUP, n - start)):
            profile_NLD[start + member, layer] = halves_22D[0, member // 2]
            profile_NLD[start + member, layer + 1] = halves_22D[1, member % 2]
    return profile_NLD


def mean_interference_dimension(decoder_FLD: Tensor) -> float:
    """1 over the mean squared cosine of distinct pairs of joint directions; nan below two."""
    rows_FN = F.normalize(decoder_FLD.double().flatten(1), dim=1)
    n_features = len(rows_FN)
    if n_features < 2:
        return math.nan
    square_FF = (rows_FN @ rows_FN.T).square().fill_diagonal_(0)
    return n_features * (n_features - 1) / square_FF.sum().item()


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _turned(direction_D: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """A unit vector at exactly `cosine` to a unit vector, in a random plane."""
    other_D = torch.randn(direction_D.shape, generator=generator)
    across_D = F.normalize(other_D - (other_D @ direction_D) * direction_D, dim=0)
    return F.normalize(cosine * direction_D + math.sqrt(1 - cosine**2) * across_D, dim=0)


class PlantedSource(Source):
    """Tokens of a planted world, drawn when they are asked for.

    draw: `(n, stream, index) -> x_BLD`, scaled: batch number `index` of `n` tokens of a stream of random numbers, a
        pure function. Training batches are of the stream of their seed.
    held_out_stream: the stream of the held-out tokens; never train with it as seed.
    held_out_tokens: how many there are; the last batch may be smaller than the others.
    distinct_tokens: training reads as many tokens over and over; None: they never repeat.
    """

    def __init__(
        self,
        draw: Callable[[int, int | str, int], Tensor],
        *,
        scale_L: Tensor,
        d_model: int,
        held_out_stream: int | str,
        held_out_tokens: int,
        distinct_tokens: int | None = None,
    ) -> None:
        self._draw, self._stream, self._distinct = draw, held_out_stream, distinct_tokens
        self.n_layers, self.d_model, self.scale_L = len(scale_L), d_model, scale_L
        self.held_out_tokens = held_out_tokens

    def batch(self, index: int, size: int, seed: int) -> Tensor:
        if self._distinct is not None:
            index %= max(1, self._distinct // size)
        return self._draw(size, seed, index)

    def marked(self) -> Iterator[Marked]:
        for index, start in enumerate(range(0, self.held_out_tokens, EVALUATION_BATCH)):
            x_BLD = self._draw(min(EVALUATION_BATCH, self.held_out_tokens - start), self._stream, index)
            yield Marked.plain(x_BLD, torch.arange(start, start + len(x_BLD)))
