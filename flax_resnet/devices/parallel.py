"""Runs a step on one device, on a mesh or under pmap, and places state and batches.

On a mesh (`jax.shard_map`) and under pmap the state is replicated, each device has its rows of the
batch, and the step reduces over the axis `axis_name`: gradients in the type of the parameters,
BatchNorm's statistics to those of the global batch. A mesh may span processes; each then holds its
rows of the batch.

Several runs of one config that differ in their seeds alone can share a program of one device.

With shard_parameters every large array of the state (parameters, optimizer state, moving average)
is sharded over the devices between steps. A step all-gathers the parameters for the forward and
backward pass, and each device updates its shard. The compiler then finds out what to reduce, as it
does in an evaluation.
"""

from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resnet.config import ParallelConfig
from flax_resnet.errors import InputError
from flax_resnet.kernels.cpu_convolution import compiler_options

AXIS = "data"
SMALLEST_SHARDED = 4096  # elements; smaller arrays, such as BatchNorm's, are replicated


class Engine:
    """Places arrays on devices and compiles steps for them.

    Args:
      devices: a compiler's description of devices that are not here (`targets.devices`); left out,
        those of this process and its peers. On the former no array can be placed.
    """

    def __init__(
        self,
        config: ParallelConfig,
        *,
        deterministic: bool = False,
        kernels: str = "auto",
        devices: list | None = None,
    ):
        self.devices = _choose_devices(config.devices) if devices is None else devices
        self.pmap = config.parallel == "pmap"
        self.shard_parameters = config.shard_parameters
        if self.pmap and config.shard_parameters:
            raise InputError("`shard_parameters`: pmap keeps whole parameters; use `parallel` jit")
        if config.reduce_dtype and config.shard_parameters:
            raise InputError("`reduce_dtype`: the compiler reduces what `shard_parameters` shards")
        if self.pmap and deterministic:
            raise InputError("`deterministic`: pmap takes no such option; use `parallel` jit")
        self.several = jax.process_count() > 1
        if self.pmap and self.several:
            raise InputError("`parallel` pmap: several processes need `parallel` jit")
        self.mesh = Mesh(np.array(self.devices), (AXIS,))
        self._whole = NamedSharding(self.mesh, PartitionSpec())
        self._by_row = NamedSharding(self.mesh, PartitionSpec(AXIS))
        platform = self.devices[0].platform
        self.members_in_turn = platform == "cpu"
        self._steps_per_dispatch = config.steps_per_dispatch
        self._options = compiler_options(platform, kernels)
        if deterministic and platform == "gpu":
            self._options = {"xla_gpu_deterministic_ops": True}

    def steps_per_dispatch(self, *, resident: bool) -> int:
        """Number of steps in a dispatch: more than one only if the images are on the device."""
        on_cpu = self.devices[0].platform == "cpu"
        return self._steps_per_dispatch or (20 if resident and not on_cpu else 1)

    @property
    def axis_name(self) -> str | None:
        """Name of the axis that step and BatchNorm reduce over; None where the compiler finds out
        what to reduce: on one device and with sharded parameters."""
        alone = len(self.devices) == 1 or self.shard_parameters
        return AXIS if self.pmap or not alone else None

    def can_share(self, batch_size: int, norm_images: int | None = None) -> bool:
        """True if every device gets as many images, and those devices that hold a group of
        `norm_images` (None: there are no groups) hold nothing else. Where the compiler finds out
        what to reduce, a group may lie anywhere."""
        each, rest = divmod(batch_size, len(self.devices))
        if rest or not norm_images:
            return not rest
        apart = self.axis_name is None or 0 in (norm_images % each, each % norm_images)
        return apart and batch_size % norm_images == 0

    def check_batch_size(self, batch_size: int, norm_images: int | None = None):
        """Raises InputError unless the devices `can_share` a batch."""
        if self.can_share(batch_size, norm_images):
            return
        devices = len(self.devices)
        if batch_size % devices:
            raise InputError(
                f"`batch_size` {batch_size} cannot be divided among {devices} devices: take a"
                " multiple, or fewer `devices`"
            )
        raise InputError(
            f"`batch_norm_images` {norm_images}: {devices} devices with {batch_size // devices}"
            " images each cannot share such groups; one number has to divide the other"
        )

    def check_members(self):
        """Raises InputError unless several runs can share a program: one process and one device,
        without pmap."""
        if self.several:
            raise InputError("`members`: several processes train one run")
        if self.pmap:
            raise InputError("`members` need `parallel` jit")
        if len(self.devices) > 1:
            raise InputError(f"`members` share one device of {len(self.devices)}: give `devices` 1")

    def local_rows(self, batch_size: int) -> slice:
        """The rows of a batch that go to the devices of this process."""
        places = self._by_row.addressable_devices_indices_map((batch_size,)).values()
        rows = [place[0].indices(batch_size) for place in places]
        return slice(min(start for start, *_ in rows), max(stop for _, stop, _ in rows))

    def replicate(self, tree):
        """Replicate arrays on every device; under pmap they get a leading axis of devices."""
        if self.pmap:
            return jax.device_put(jax.tree.map(self._repeated, tree), self._by_row)
        return self._place(tree, jax.tree.map(lambda _: self._whole, tree))

    def _repeated(self, x):
        """Broadcast `[...]` to `[D, ...]` as a view on the host, where it takes no memory."""
        return np.broadcast_to(np.asarray(x), (len(self.devices), *np.shape(x)))

    def place_state(self, state):
        """Place a `TrainState` as the compiled step takes and returns it."""
        if self.pmap:
            return self.replicate(state)
        places = jax.tree.map(lambda x: self._sharding(x.shape), state)
        return self._place(state, places)

    def _place(self, tree, places):
        """Place arrays that every process has on the devices of all processes."""
        if not self.several:
            return jax.device_put(tree, places)
        host = jax.tree.map(np.asarray, tree)
        return jax.tree.map(
            lambda x, place: jax.make_array_from_callback(x.shape, place, lambda i: x[i]),
            host,
            places,
        )

    def _place_rows(self, tree, place):
        """Place the rows of a batch on all devices; each process gives its `local_rows`."""
        if not self.several:
            return jax.device_put(tree, place)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), tree)

    def state_like(self, state):
        """Shapes, types and shardings of a `TrainState`, for a checkpoint to restore into."""

        return jax.tree.map(lambda x: _like(x, self._sharding(x.shape)), state)

    def replicated_like(self, tree):
        """The shapes and types of a tree of arrays, replicated on every device."""
        return jax.tree.map(lambda x: _like(x, self._whole), tree)

    def batches_like(self, batch: dict, num_steps: int):
        """Shapes, types and shardings of what `shard` makes of so many batches.

        Args:
          batch: shapes and types of one batch, over all devices.
        """
        place = self._place_of_batches(num_steps > 1)
        if num_steps > 1:
            batch = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((num_steps, *x.shape), x.dtype), batch
            )
        return jax.tree.map(lambda x: _like(x, place), batch)

    def gather(self, tree):
        """All-gather sharded arrays inside a step; the gradient of this is sharded."""
        if not self.shard_parameters:
            return tree
        return lax.with_sharding_constraint(self._sharded(tree), self._whole)

    def _sharded(self, tree):
        places = jax.tree.map(lambda x: self._sharding(x.shape), tree)
        return lax.with_sharding_constraint(tree, places)

    def _sharding(self, shape) -> NamedSharding:
        """The sharding of a state's array: along its largest axis that can be split, or none."""
        axes = [a for a, size in enumerate(shape) if size % len(self.devices) == 0]
        if not (self.shard_parameters and axes and np.prod(shape) >= SMALLEST_SHARDED):
            return self._whole
        largest = max(axes, key=lambda a: shape[a])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * largest, AXIS))

    def single(self, tree):
        """Remove the axis of devices that `replicate` adds under pmap; arrays stay replicated."""
        return self._without_axis(tree) if self.pmap else tree

    @cached_property
    def _without_axis(self):
        """Takes the axis of devices from each device's own copy. Written as `x[0]`, every array
        would be a program that sends the first copy to all devices; eight CPU devices once hung
        while many of these programs were under way."""
        own = jax.shard_map(
            partial(jax.tree.map, lambda x: x[0]),
            mesh=self.mesh,
            in_specs=PartitionSpec(AXIS),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return jax.jit(own)

    def shard(self, batches: list[dict]):
        """Stack and place batches of `[B, ...]` for the compiled step: `[(K,) (D,) B / D, ...]`.

        The axis of K steps exists if a dispatch has several steps, the axis of D devices under
        pmap. Each process gives its `local_rows` of the batches.
        """
        several = len(batches) > 1
        stacked = jax.tree.map(lambda *x: np.stack(x) if several else x[0], *batches)
        if self.pmap:
            return jax.tree.map(lambda x: self._split(x, several), stacked)
        return self._place_rows(stacked, self._place_of_batches(several))

    def _place_of_batches(self, several: bool) -> NamedSharding:
        spec = PartitionSpec(None, AXIS) if several else PartitionSpec(AXIS)
        return NamedSharding(self.mesh, spec)

    def _split(self, x, several):
        shape = x.shape[: 1 if several else 0] + (len(self.devices), -1)
        x = x.reshape(*shape, *x.shape[len(shape) - 1 :])
        return np.swapaxes(x, 0, 1) if several else x

    def compile_train(self, train_step, num_steps: int):
        """Compile (state, resident data, batches) -> (state, metrics); the state is donated.

        Resident data are {"image", "label"} of the whole training split, with which batches need
        only indices, or {}.

        Args:
          train_step: made by `steps.make_train_step` with `gather` and `axis_name` of this engine.
          num_steps: steps of one dispatch; with more than 1 each metric is `[K]`.
        """
        run = self._dispatch(train_step, num_steps)
        if self.pmap:
            return jax.pmap(run, AXIS, donate_argnums=0, devices=self.devices)
        if self.axis_name is not None:
            # Written out, a gradient is summed over the devices in float32. Left to the compiler,
            # that of a bfloat16 kernel would be summed in bfloat16, before its conversion.
            whole, rows = PartitionSpec(), self._place_of_batches(num_steps > 1).spec
            run = jax.shard_map(
                run,
                mesh=self.mesh,
                in_specs=(whole, whole, rows),
                out_specs=whole,
                check_vma=False,
            )
        return jax.jit(run, donate_argnums=0, compiler_options=self._options)

    def compile_members(self, train_step, num_steps: int):
        """Compile (states, resident data, batches, seeds) -> (states, metrics) of N runs.

        States, batches and metrics are tuples of N, seeds are int32 `[N]`, and all runs share the
        resident data; the states are donated.

        A GPU computes all runs at once (`jax.vmap`). A CPU computes one after the other: XLA has no
        fast kernel there for the grouped convolutions that `vmap` makes.

        Args:
          train_step: as `compile_train`.
          num_steps: as `compile_train`.
        """

        def run(states, resident, batches, seeds):
            def one(member):
                state, batch, seed = member
                step = partial(train_step, seed=seed)
                return self._dispatch(step, num_steps)(state, resident, batch)

            members = _stacked(states), _stacked(batches), seeds
            found = lax.map(one, members) if self.members_in_turn else jax.vmap(one)(members)
            return tuple(zip(*(_unstacked(found, i) for i in range(len(seeds))), strict=True))

        return jax.jit(run, donate_argnums=0, compiler_options=self._options)

    def _dispatch(self, train_step, num_steps: int):
        """(state, resident data, batches) -> (state, metrics) of one dispatch."""

        def step(state, resident, batch):
            new, metrics = train_step(state, look_up(resident, batch))
            return (self._sharded(new) if self.axis_name is None else new), metrics

        def run(state, resident, batches):
            if num_steps == 1:
                return step(state, resident, batches)
            return lax.scan(lambda s, batch: step(s, resident, batch), state, batches)

        return run

    def compile_eval(self, eval_step):
        """Compile (variables, batch) -> sums over the batch; evaluation never uses pmap."""
        return jax.jit(eval_step, compiler_options=self._options)

    def shard_eval(self, batch: dict):
        """Place a batch of an evaluation, sharded over the mesh; processes give their rows."""
        return self._place_rows(batch, self._by_row)

    def whole(self, tree):
        """Replicate sharded arrays once, for all steps of an evaluation."""
        if not self.shard_parameters:
            return tree
        return jax.jit(lambda x: x, out_shardings=self._whole)(tree)

    def fetch_metrics(self, metrics) -> dict[str, np.ndarray]:
        """Fetch the metrics of one dispatch as `[K]` arrays on the host."""
        return {k: np.atleast_1d(v) for k, v in jax.device_get(self.single(metrics)).items()}


def _stacked(trees):
    """N trees of `[...]` as one of `[N, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstacked(tree, number: int):
    """The tree with this number of those that `_stacked` joined."""
    return jax.tree.map(lambda leaf: leaf[number], tree)


def _like(x, sharding: NamedSharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _choose_devices(count: int | None) -> list:
    """The first `count` devices (None: all), equally many of each process, in their order."""
    processes = range(jax.process_count())
    own = [[d for d in jax.devices() if d.process_index == process] for process in processes]
    sizes = [len(devices) for devices in own]
    count = count or sum(sizes)
    if count > sum(sizes):
        raise InputError(f"`devices` {count}: there are {sum(sizes)}")
    if len(set(sizes)) > 1:
        raise InputError(f"the processes have different numbers of devices: {sizes}")
    if count % len(own):
        raise InputError(f"`devices` {count} cannot be divided among {len(own)} processes")
    return [device for devices in own for device in devices[: count // len(own)]]


def look_up(resident: dict, batch: dict) -> dict:
    """The batch with the resident images and labels of its indices, if there are resident data."""
    if not resident:
        return batch
    index = batch["index"] % len(resident["label"])  # copies count on
    image, label = (resident[name][index] for name in ("image", "label"))
    return {"image": image, "label": label, "index": batch["index"]}
