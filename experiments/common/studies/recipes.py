"""The models of section 4.2 of the batch normalization paper, change by change."""

import dataclasses
from typing import Literal, get_args

import flax.linen as nn

from experiments.common.data.distortions import Strength
from experiments.common.data.shuffling import Shuffle
from experiments.common.models.convolutions import Style
from experiments.common.models.inception import Inception
from experiments.common.training import optimizers
from experiments.common.training.optimizers import Optimizer

FASTER_DECAY = 6
WEAKER_L2 = 5
LESS_DROPOUT = 0.05, 0.1  # of an ensemble's members
LARGER_WEIGHTS = 1.0, 1.5


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained; the original Inception, unless told otherwise.

    Attributes:
        normalize: whether there is batch normalization.
        activation: the nonlinearity.
        rate: a factor of the learning rate; 1 is no change.
        no_dropout: whether dropout is removed.
        less_l2: whether the weight of L2 is divided by `WEAKER_L2`.
        faster_decay: whether the learning rate decays `FASTER_DECAY` times as fast.
        no_lrn: whether local response normalization is removed.
        shuffle: whether shards are shuffled inside.
        less_distortion: whether colours are changed less.
        weights: the standard deviation of the first kernels, over He's.
    """

    normalize: bool = False
    activation: Literal["relu", "sigmoid"] = "relu"
    rate: float = 1.0
    no_dropout: bool = False
    less_l2: bool = False
    faster_decay: bool = False
    no_lrn: bool = False
    shuffle: bool = False
    less_distortion: bool = False
    weights: float = 1.0


ORIGINAL = Recipe()
Change = Literal[
    "rate",
    "no_dropout",
    "less_l2",
    "faster_decay",
    "no_lrn",
    "shuffle",
    "less_distortion",
]
CHANGES: tuple[Change, ...] = get_args(Change)
"""The seven of section 4.2.1, in its order."""
X5 = Recipe(True, "relu", 5.0, *(len(CHANGES) - 1) * (True,))
Model = Literal[
    "inception",
    "bn_baseline",
    "bn_x5",
    "bn_x30",
    "bn_x5_sigmoid",
    "inception_x5",
    "sigmoid",
]
MODELS: dict[Model, Recipe] = {
    "inception": ORIGINAL,
    "bn_baseline": Recipe(normalize=True),
    "bn_x5": X5,
    "bn_x30": dataclasses.replace(X5, rate=30.0),
    "bn_x5_sigmoid": dataclasses.replace(X5, activation="sigmoid"),
    "inception_x5": Recipe(rate=5.0),
    "sigmoid": Recipe(activation="sigmoid"),
}


@dataclasses.dataclass(frozen=True)
class Amounts:
    """The strengths of what the changes change, before they do."""

    learning_rate: float = 0.03
    """Of Inception and of BN-Baseline, at first; see --tune."""
    decay: float = 0.5
    """What is left of the rate at the end; with faster decay its sixth power."""
    l2: float = 1e-4
    """The decay of kernels per step, over the learning rate."""
    dropout: float = 0.4
    """The share of features that are dropped before the last matrix."""
    divisor: int = 8
    """Of the paper's widths; 1 for its own network."""
    modules: tuple[str, ...] = ("3a", "3c", "4a", "4e", "5a", "5b")
    """Of the paper's table, which ones."""


def without(change: Change) -> Recipe:
    """BN-x5 but for one change."""
    return dataclasses.replace(X5, **{change: getattr(ORIGINAL, change)})


def member(index: int) -> tuple[Recipe, float]:
    """One network of an ensemble, and its dropout: BN-x30, varied as in 4.2.3."""
    recipe = dataclasses.replace(
        MODELS["bn_x30"], no_dropout=False, weights=LARGER_WEIGHTS[index // 2 % 2]
    )
    return recipe, LESS_DROPOUT[index % 2]


def network(recipe: Recipe, amounts: Amounts, side: int, classes: int) -> Inception:
    """For square images of so many pixels a side."""
    activation = {"relu": nn.relu, "sigmoid": nn.sigmoid}[recipe.activation]
    return Inception(
        style=Style(
            recipe.normalize,
            activation,
            recipe.weights,
            divisor=amounts.divisor,
        ),
        modules=amounts.modules,
        small=side <= 64,
        lrn=not recipe.no_lrn,
        dropout=0.0 if recipe.no_dropout else amounts.dropout,
        classes=classes,
    )


def optimizer(recipe: Recipe, amounts: Amounts, steps: int) -> Optimizer:
    """For so many steps."""
    return optimizers.exponential(
        steps / (FASTER_DECAY if recipe.faster_decay else 1),
        amounts.decay,
        amounts.learning_rate * recipe.rate,
        amounts.l2 / (WEAKER_L2 if recipe.less_l2 else 1),
    )


def shuffle(recipe: Recipe) -> Shuffle:
    """What each epoch shuffles."""
    return "within-shards" if recipe.shuffle else "shards-only"


def colours(recipe: Recipe) -> Strength:
    """How much the colours of images are changed."""
    return "weak" if recipe.less_distortion else "strong"
