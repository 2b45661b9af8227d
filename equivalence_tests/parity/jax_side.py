"""Runs a case in JAX: the three functions of `flax_resnet.training.steps`, with probes.

The network returns its activations beside the running statistics. It also adds an extra parameter,
zeros, to the images, whose gradient is that of the images. Both are removed before the gradients
are applied.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_resnet
from equivalence_tests.parity import inputs, replay
from equivalence_tests.parity.inputs import Case
from equivalence_tests.parity.torch_side import RETURNED
from flax_resnet.config import ScheduleConfig, TrainConfig
from flax_resnet.interop.training_state import named_arrays, optimizer_arrays
from flax_resnet.kernels.cpu_convolution import compiler_options
from flax_resnet.models import layers
from flax_resnet.models.summary import recorded_activations
from flax_resnet.training import losses, steps
from flax_resnet.training.network import Network, Variables

IMAGES = "images"
FORWARD = "forward"


def run(case: Case, dtype=np.float64, *, train=True, decisions=None, jit=False, edit=None) -> dict:
    """Returns a trace (`engine.run_jax`)."""
    network, config, state = start(case, dtype, edit=edit)
    probed = probed_train_step if train else probed_evaluation
    step = probed(network, config, case.num_classes)
    if jit:
        step = jax.jit(step, compiler_options=compiler_options("cpu", case.kernels))
    values = {}
    for index in range(len(case.images)):
        batch = batch_of(case, index, dtype, decisions and decisions[index])
        state, seen = step(state, batch)
        values[f"loss of step {index}"] = np.asarray(seen.pop("loss"))
    return trace(state, seen, values, config, train=train)


def start(case: Case, dtype=np.float64, *, compute_dtype=None, edit=None):
    """The network with the weights of the case, the config of its step and the first state."""
    model = make_model(case, dtype, compute_dtype)
    if edit:
        edit(model)
    config = TrainConfig(optimizer=case.optimizer, schedule=ScheduleConfig(schedule="constant"))
    network = ProbedNetwork(model)
    state = steps.make_state(network.initial, config)
    network.initial = None  # a second copy of up to 127 million numbers
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(dtype)}
    return network, config, state


def make_model(case: Case, dtype=np.float64, compute_dtype=None) -> nnx.Module:
    """A model with the weights of the case; skips the slow random initialization."""
    model = nnx.eval_shape(
        lambda: flax_resnet.create_model(
            case.arch,
            case.num_classes,
            in_channels=case.images.shape[-1],
            stem=case.stem,
            shortcut=case.shortcut,
            dropout=case.dropout,
            kernels=case.kernels,
            batch_norm_images=case.batch_norm_images,
            dtype=compute_dtype,
            param_dtype=dtype,
        )
    )
    nnx.update(model, jax.tree.map(_blank, nnx.state(model)))
    return flax_resnet.load_state_dict(model, case.arrays)


def _blank(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(leaf.shape, leaf.dtype)


def batch_of(case: Case, index: int, dtype=np.float64, decisions=None) -> dict:
    """The batch of a step, with dropout mask and decisions to replay."""
    return {
        "image": jnp.asarray(case.images[index], dtype),
        "label": jnp.asarray(case.labels[index], jnp.int32),
        "index": jnp.arange(len(case.labels[index]), dtype=jnp.int32),
        "mask": None if case.masks is None else jnp.asarray(case.masks[index]),
        "decisions": None if decisions is None else replay.channels_last(decisions),
    }


class ProbedNetwork(Network):
    """A network that also returns its activations and takes the gradient of its images."""

    def apply(self, variables, images, **options):
        params = dict(variables.params)
        images = images + params.pop(IMAGES)
        with contextlib.ExitStack() as self._recording:
            logits, stats = super().apply(variables._replace(params=params), images, **options)
        return logits, stats | {FORWARD: self._outputs}

    def _merge(self, variables):
        model = super()._merge(variables)
        self._outputs = self._recording.enter_context(recorded_activations(model))
        self._recording.enter_context(recorded_pools(self._outputs))
        return model


def recorded_pools(outputs: dict):
    """Adds the outputs of pools, which are functions in JAX, under the names of torch's modules."""
    counts = {}

    def recording(function, name):
        def call(*args, **kwargs):
            output = function(*args, **kwargs)
            counts[name] = counts.get(name, 0) + 1
            outputs[name if counts[name] == 1 else f"{name}:{counts[name]}"] = output
            return output

        return call

    pools = {
        "max_pool": "maxpool",
        "global_average_pool": "avgpool",
        "adaptive_average_pool": "avgpool",
    }
    patches = {f: recording(getattr(layers, f), name) for f, name in pools.items()}
    return mock.patch.multiple(layers, **patches)


def probed_train_step(network: ProbedNetwork, config: TrainConfig, num_classes: int):
    """A training step: (state, batch) -> (state, {"forward", "loss", "gradient"})."""

    def probed(state, batch):
        prepared = steps.prepare_batch(
            state, batch, config, inputs.AsGiven(), num_classes=num_classes
        )
        with _replayed(batch):
            gradients, forward = steps.loss_and_gradients(
                network, _with_probe(state, batch), prepared, config
            )
        stats = dict(forward.batch_stats)
        seen = {FORWARD: stats.pop(FORWARD), "gradient": gradients, "loss": forward.loss}
        learning_rate = jnp.asarray(config.optimizer.lr, state.lr_scale.dtype)
        new = steps.apply_gradients(state, _without_images(gradients), stats, config, learning_rate)
        return new, seen

    return probed


def probed_evaluation(network: ProbedNetwork, config: TrainConfig, num_classes: int):
    """A forward and backward pass in evaluation mode, as `probed_train_step`; keeps the state."""
    smoothing = config.optimizer.label_smoothing

    def probed(state, batch):
        def objective(params):
            variables = Variables(params, state.frozen, state.batch_stats)
            logits, stats = network.apply(variables, batch["image"], train=False)
            targets = losses.soft_targets(
                batch["label"], num_classes, smoothing, batch["image"].dtype
            )
            return losses.cross_entropy(logits, targets).mean(), stats[FORWARD]

        params = _with_probe(state, batch).params
        with _replayed(batch):
            (loss, forward), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return state, {FORWARD: forward, "loss": loss, "gradient": gradient}

    return probed


def _with_probe(state, batch):
    return state._replace(params=state.params | {IMAGES: jnp.zeros_like(batch["image"])})


def _without_images(tree):
    return {k: v for k, v in tree.items() if k != IMAGES}


@contextlib.contextmanager
def _replayed(batch):
    with contextlib.ExitStack() as stack:
        stack.enter_context(replay.masked_jax(batch["mask"]))
        if batch["decisions"] is not None:
            stack.enter_context(replay.replayed_jax(batch["decisions"]))
        yield


def trace(state, seen: dict, values: dict, config: TrainConfig, *, train=True) -> dict:
    """A trace: every array with torch's names and layouts."""
    gradients = named_arrays(_without_images(seen["gradient"]))
    gradients[IMAGES] = np.asarray(seen["gradient"][IMAGES]).transpose(0, 3, 1, 2)
    result = {
        FORWARD: {n or RETURNED: _channels_first(a) for n, a in seen[FORWARD].items()},
        "loss": values,
        "gradient": gradients,
    }
    if not train:
        return result
    return result | {
        "batch_norm": named_arrays(state.batch_stats),
        "optimizer": optimizer_arrays(state.opt_state, config.optimizer.optimizer),
        "parameters": named_arrays(state.params),
    }


def _channels_first(array) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype == jnp.bfloat16:  # NumPy has no arithmetic for bfloat16
        array = array.astype(np.float32)
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
