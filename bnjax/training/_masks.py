"""Trees of booleans over parameters and statistics, as optax takes them."""

from typing import Any

from bnjax import _trees


def weight_decay_mask(params: Any, *, batch_stats: Any = None) -> Any:
    """Where weight decay applies: not to batch normalization's scale, nor to any bias.

    Decaying the scale of a layer that is normalized again only changes its effective
    learning rate, and a bias has nothing to overfit with.

    Args:
        params: of Linen (`variables["params"]`) or of NNX.
        batch_stats: of the same model; tells which layers are batch normalization.
            Without it each parameter named scale is left out, those of Flax's other
            normalizations too.

    Returns:
        A tree of bool of the structure of `params`, True where weight decay applies:
        `optax.adamw(1e-3, mask=weight_decay_mask)`,
        `optax.masked(optax.add_decayed_weights(1e-4), weight_decay_mask(params))`.

    >>> params = {"conv": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0}}
    >>> print(weight_decay_mask(params))
    {'conv': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}

    References: Goyal et al. 2017, section 5.1.
    """
    known = batch_stats is not None
    layers = {_trees.layer_of(path) for path in _trees.flatten(batch_stats)[0]}

    def decays(path: str, _: Any) -> bool:
        name = path.rpartition("/")[2]
        normalizes = _trees.layer_of(path) in layers if known else name == "scale"
        return not (normalizes or name == "bias")

    return _trees.map_paths(decays, params)


def freeze_mask(tree: Any, *patterns: str) -> Any:
    """What is frozen, by patterns of paths: parameters, or running statistics.

    Freezing batch normalization is three decisions, each taken separately:

        are scale and bias trained?           freeze_mask(params, ...)
        are the running statistics used?      the layer's use_running_average
        are the running statistics updated?   its update_stats; freeze_mask(stats, ...)

        used  updated
        yes   no       use_running_average=True: a constant affine map ("frozen BN")
        yes   yes      use_running_average=True, update_stats=True
        no    no       use_running_average=False, update_stats=False
        no    yes      use_running_average=False: training

    A mask of the statistics answers only the last question, for chosen layers and
    without a change of the model: these keep theirs, whatever the layers wrote.

        frozen = freeze_mask(params, "encoder/*")
        tx = optax.chain(tx, optax.masked(optax.set_to_zero(), frozen))
        frozen = freeze_mask(batch_stats, "encoder/*")
        batch_stats = jax.tree.map(jnp.where, frozen, batch_stats, new_batch_stats)

    Args:
        tree: parameters or `batch_stats`, of Linen or of NNX.
        *patterns: of paths such as "encoder/norm_1/scale", as of a shell; `*` stands
            for any characters, `/` among them: `"*/norm_*/scale"`, `"encoder/*"`.

    Returns:
        A tree of bool of the structure of `tree`, True where frozen.

    Raises:
        ValueError: a pattern that matches nothing.

    >>> params = {"encoder": {"norm": {"bias": 0.0, "scale": 1.0}}, "head": {"bias": 0}}
    >>> print(freeze_mask(params, "encoder/*/scale"))
    {'encoder': {'norm': {'bias': False, 'scale': True}}, 'head': {'bias': False}}

    References: Wu & Johnson 2021, section 4 (FrozenBN).
    """
    frozen = _trees.matching(patterns, set(_trees.flatten(tree)[0]), "pattern")
    return _trees.map_paths(lambda path, _: path in frozen, tree)
