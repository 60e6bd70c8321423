"""What the columns and charts of the browser are called, and what they mean."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """A number that every feature has, by which features are sorted and filtered. log: drawn on a log scale."""

    key: str
    words: str
    definition: str
    kind: str = "number"
    log: bool = False


COLUMNS = (
    Column("rate", "Firing rate", "Share of the tokens read on which the feature is active.", "share", log=True),
    Column("largest", "Largest activation", "The largest activation on the tokens read, in the dictionary's units."),
    Column("mean", "Mean activation", "The mean activation over the tokens on which it is active."),
    Column(
        "spread",
        "Spread",
        "Layers that it writes to, 1 / sum of squared shares of its decoder's squared norm, from 1 to the number of "
        "layers, each layer at the scale of the dictionary's inputs.",
    ),
    Column(
        "use",
        "Layers read",
        "Layers that move it: 1 / sum of squared shares, where a layer's share is the magnitude of its mean part of "
        "the pre-activation, <encoder_l, x_l - center_l>, over tokens on which the feature is active.",
    ),
    Column(
        "density",
        "Density",
        "Share of the tokens on which it is active, of those read in the blocks of text in which it is active at all: "
        "near 1 for a feature of whole passages, near 1 / block length for one of single tokens.",
        "share",
        log=True,
    ),
    Column(
        "stability",
        "Stability",
        "Share of the other dictionaries of the same form (other seeds) in which it is found: the two are each other's "
        "nearest by decoder cosine, which is at least 0.7. Unknown where no other was given.",
        "share",
    ),
    Column(
        "drift",
        "Steadiness",
        "Mean cosine between its decoder rows at neighbouring layers that it both occupies: 1 for a direction that "
        "stays as it is, less for one that drifts. Unknown for a feature that occupies one layer.",
    ),
)
DEFINITIONS = (
    (
        "written",
        "A layer's share of the squared decoder norm, each layer at the scale of the dictionary's inputs: at which all "
        "layers have equal norm, or with input scale 1 that of raw activations, where loud layers count more.",
    ),
    (
        "read",
        "A layer's mean part of the pre-activation over tokens on which the feature is active, over the sum of all "
        "layers' magnitudes; negative where the layer speaks against the feature.",
    ),
    (
        "one layer's reading",
        "Of the tokens that the reading <decoder_l, x_l> of one layer tells at a recall of 0.9, the share on which the "
        "feature is active. Recall is that of sampled tokens on which it is, false alarms are counted on tokens evenly "
        "spread over the text. 'all' is the sum of all layers' readings.",
    ),
    (
        "layer by layer",
        "What each layer adds to the pre-activation at each token, in per cent of the largest part in the example; "
        "blue is against.",
    ),
    (
        "what is not read",
        "First tokens of blocks, special tokens and tokens of huge norm are not read by the dictionary and shown pale.",
    ),
)
EFFECTS = (
    "Logits that an activation of 1 adds, straight from the decoder's row through the final norm (its gain applied, "
    "its scale held at the mean token's) and the output head, less their mean over the vocabulary. {site}"
)
SITES = {
    "residual": "The dictionary reads a residual stream: the last layer's row is what reaches the head, the sum weighs "
    "all layers.",
    "write": "The dictionary reads what blocks write: the sum is all that the feature adds.",
    "mlp": "The sum is all that the feature adds by the outputs that it writes.",
}
QUANTILES = (
    "Drawn evenly from all tokens on which the feature is active: {sampled} of them at most, cut into quarters by how "
    "strongly it is."
)
NEAREST = (
    "Cosine of what decoders write: between crosscoders over all layers together, to and from a bank on one layer."
)
