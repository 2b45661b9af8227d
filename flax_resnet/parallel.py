"""One step function under one device, a mesh, or pmap; where state and batch live.

Under jit the state is replicated over a mesh and the batch split along its "data" axis: the
compiler turns every mean into one of the global batch, BatchNorm's included. Under pmap the
step itself says so (`axis_name`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resnet.config import InputError, ParallelConfig
from flax_resnet.models import cpu_convolution

AXIS = "data"


class Engine:
    """Places arrays on the devices and compiles steps for them."""

    def __init__(self, config: ParallelConfig, *, deterministic: bool = False):
        available = jax.devices()
        count = config.devices or len(available)
        if count > len(available):
            raise InputError(f"--devices {count}: this machine has {len(available)}")
        self.devices = available[:count]
        self.pmap = config.parallel == "pmap"
        self.mesh = Mesh(np.array(self.devices), (AXIS,))
        on_cpu = self.devices[0].platform == "cpu"
        self.steps_per_dispatch = config.steps_per_dispatch or (1 if on_cpu else 20)
        self._options = cpu_convolution.COMPILER_OPTIONS if on_cpu else {}
        if deterministic and not on_cpu:
            self._options = {"xla_gpu_deterministic_ops": True}

    @property
    def axis_name(self) -> str | None:
        """What the step and BatchNorm have to be told."""
        return AXIS if self.pmap else None

    def check_batch_size(self, batch_size: int):
        """Raises InputError unless the devices can share a batch evenly."""
        if batch_size % len(self.devices):
            raise InputError(
                f"batch size {batch_size} cannot be divided among {len(self.devices)} devices"
            )

    def replicate(self, tree):
        """The same arrays on every device; under pmap with a leading axis of devices."""
        if self.pmap:
            tree = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * len(self.devices)), tree)
            return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(AXIS)))
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def single(self, tree):
        """One copy of what `replicate` made: same values, no axis of devices."""
        return jax.tree.map(lambda x: x[0], tree) if self.pmap else tree

    def shard(self, batches: list[dict]):
        """Batches of `[B, ...]` -> what the compiled step takes: `[(K,) (D,) B / D, ...]`.

        K, the number of steps of one dispatch, is there if there are several; D, the number of
        devices, under pmap.
        """
        several = len(batches) > 1
        stacked = jax.tree.map(lambda *x: np.stack(x) if several else x[0], *batches)
        if self.pmap:
            return jax.tree.map(lambda x: self._split(x, several), stacked)
        spec = PartitionSpec(None, AXIS) if several else PartitionSpec(AXIS)
        return jax.device_put(stacked, NamedSharding(self.mesh, spec))

    def _split(self, x, several):
        shape = x.shape[: 1 if several else 0] + (len(self.devices), -1)
        x = x.reshape(*shape, *x.shape[len(shape) - 1 :])
        return np.swapaxes(x, 0, 1) if several else x

    def compile_train(self, train_step, num_steps: int):
        """(state, resident data, batches) -> (state, metrics), the state donated.

        Args:
          train_step: `steps.make_train_step`'s.
          num_steps: steps of one dispatch; with more than 1 the metrics are `[K]` each.

        Batches are without images where resident data ({"image", "label"} of the whole split)
        holds them.
        """

        def step(state, resident, batch):
            return train_step(state, look_up(resident, batch))

        def run(state, resident, batches):
            if num_steps == 1:
                return step(state, resident, batches)
            return lax.scan(lambda s, batch: step(s, resident, batch), state, batches)

        if self.pmap:
            return jax.pmap(run, AXIS, donate_argnums=0, devices=self.devices)
        return jax.jit(run, donate_argnums=0, compiler_options=self._options)

    def compile_eval(self, eval_step):
        """(variables, batch) -> sums over the batch; never under pmap."""
        return jax.jit(eval_step, compiler_options=self._options)

    def shard_eval(self, batch: dict):
        """A batch of an evaluation, split along the mesh."""
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def fetch_metrics(self, metrics) -> dict[str, np.ndarray]:
        """Metrics of one dispatch as `[K]` arrays on the host."""
        return {k: np.atleast_1d(v) for k, v in jax.device_get(self.single(metrics)).items()}


def look_up(resident: dict, batch: dict) -> dict:
    """A batch of numbers -> with the images and labels that they stand for."""
    if not resident:
        return batch
    index = batch["index"]
    return {"image": resident["image"][index], "label": resident["label"][index], "index": index}
