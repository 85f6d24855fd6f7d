"""What surrounds the layers in a training loop.

- `TrainState`: Flax's TrainState with batch_stats; a skipped step does not change them
- `accumulate`: gradients of micro-batches; one running update, from all of them
- `weight_decay_mask`: where weight decay applies, for optax
- `freeze_mask`: what is frozen, by patterns of paths, for optax and statistics
- `reset_batch_stats`: mean 0, variance 1
- `merge_batch_stats`: one set of running statistics from those of replicas
"""

from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from bnjax import _trees
from bnjax.training._batch_stats import (
    Accumulated,
    accumulate,
    merge_batch_stats,
    reset_batch_stats,
)

__all__ = [
    "Accumulated",
    "TrainState",
    "accumulate",
    "freeze_mask",
    "merge_batch_stats",
    "reset_batch_stats",
    "weight_decay_mask",
]


class TrainState(train_state.TrainState):
    """Flax's TrainState with `batch_stats`, which a skipped step does not change.

    `state.apply(params, x, ...)` calls the model and always returns the pair (output,
    batch_stats), in training and in evaluation; `mutable` does not appear:

        def loss_fn(params):
            logits, batch_stats = state.apply(params, images, train=True)
            return cross_entropy(logits, labels), batch_stats

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads, batch_stats=batch_stats)

    Attributes:
        step: how many times gradients were applied, skipped steps included.
        apply_fn: `model.apply`.
        params: the parameters.
        tx: the optax optimizer.
        opt_state: the state of the optimizer.
        batch_stats: the running statistics.

    >>> import bnjax
    >>> model, x = bnjax.BatchNorm(), jnp.array([[1.0], [3.0]])
    >>> variables = model.init(jax.random.key(0), x, use_running_average=True)
    >>> state = TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **variables)
    >>> y, batch_stats = state.apply(state.params, x, use_running_average=False)
    >>> state = state.apply_gradients(grads=state.params, batch_stats=batch_stats)
    >>> print(state.batch_stats["mean"])
    [0.02]

    References: google/flax, flax/training/train_state.py.
    """

    batch_stats: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes: {"params", "batch_stats"}."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def apply(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Calls the model, in training or evaluation alike.

        Args:
            params: the parameters: `state.params`, or those that jax.grad traces.
            *args: of the model.
            **kwargs: of the model (`train=True`) and of `model.apply` (`rngs=...`).

        Returns:
            (output, batch_stats), the running statistics that the call leaves, which in
            evaluation are those of the state.
        """
        variables = {"params": params, "batch_stats": self.batch_stats}
        output, left = self.apply_fn(
            variables, *args, mutable=["batch_stats"], **kwargs
        )
        return output, left["batch_stats"]

    def apply_gradients(
        self,
        *,
        grads: Any,
        batch_stats: Any = None,
        finite: jax.Array | bool = True,
        **kwargs: Any,
    ) -> Self:
        """One step of the optimizer, and the new running statistics.

        A skipped step leaves params, optimizer state and `batch_stats` unchanged. A
        step is skipped if `finite` is False, or by the optimizer: within
        `optax.apply_if_finite`, or by `should_skip_update_fn` of `optax.MultiSteps`.
        (After too many skipped steps, apply_if_finite applies gradients that are not
        finite. The statistics do not change even then.)

        Args:
            grads: the gradients, of the structure of `params`.
            batch_stats: the new running statistics; None for those of the state.
            finite: whether to take the step: `is_finite`, the second result of
                `flax.training.dynamic_scale.DynamicScale.value_and_grad`.
            **kwargs: other fields to replace, also where the step is skipped.

        Returns:
            The new state, `step` one higher.
        """
        new = super().apply_gradients(grads=grads, **kwargs)
        if batch_stats is not None:
            new = new.replace(batch_stats=batch_stats)
        for skipped in _skips(self.opt_state, new.opt_state):
            kept = _select(skipped, self.batch_stats, new.batch_stats)
            new = new.replace(batch_stats=kept)
        if finite is True:
            return new
        names = ("params", "opt_state", "batch_stats")
        old = {name: getattr(self, name) for name in names}
        return new.replace(
            **_select(finite, {name: getattr(new, name) for name in names}, old)
        )


def _skips(before: Any, after: Any) -> list[jax.Array]:
    """For each part of the optimizer that may skip a step, whether it has."""
    counts = zip(
        _fields_named(before, "total_notfinite"),
        _fields_named(after, "total_notfinite"),
        strict=True,
    )
    return [new > old for old, new in counts] + _fields_named(after, "should_skip")


def _fields_named(opt_state: Any, name: str) -> list[Any]:
    return [value for _, value in optax.tree.get_all_with_path(opt_state, name)]


def _select(condition: Any, value: Any, other: Any) -> Any:
    return jax.tree.map(lambda v, o: jnp.where(condition, v, o), value, other)


def weight_decay_mask(params: Any, *, batch_stats: Any = None) -> Any:
    """Where weight decay applies: not to parameters named bias or scale.

    Decaying the scale of a layer that is normalized again only changes its effective
    learning rate, and biases are few and contribute little to overfitting. A scale is
    recognized by its name, also in Flax's LayerNorm and others. With `batch_stats`,
    biases and the parameters of batch normalization do not decay, and all others do.

    Args:
        params: the parameters, of Linen (`variables["params"]`) or of NNX.
        batch_stats: the statistics of the same model, which show the layers that are
            batch normalization; scales of other layers then decay.

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
    without a change of the model: put the old statistics back in place of the new ones.

        frozen = freeze_mask(params, "encoder/*")
        tx = optax.chain(tx, optax.masked(optax.set_to_zero(), frozen))
        frozen = freeze_mask(batch_stats, "encoder/*")
        batch_stats = jax.tree.map(jnp.where, frozen, batch_stats, new_batch_stats)

    Args:
        tree: parameters or `batch_stats`, of Linen or of NNX.
        *patterns: shell patterns of paths such as "encoder/norm_1/scale". `*` stands
            for any characters, even `/`: `"*/norm_*/scale"`, `"encoder/*"`.

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
