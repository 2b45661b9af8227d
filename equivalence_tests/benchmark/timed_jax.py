"""The JAX side of the throughput comparison: `flax_resnet`'s own train step and engine.

Variants: jit (one jitted step), multi_step (several steps per dispatch by `lax.scan`), mesh (a mesh
of one device), deterministic (mesh under --deterministic) and pmap. Inference also has folded
(BatchNorm merged into the convolutions).
"""

import jax
import jax.numpy as jnp
import numpy as np

from equivalence_tests.benchmark import timing
from equivalence_tests.benchmark.timing import Job, Program, Skipped
from equivalence_tests.parity import inputs
from flax_resnet.config import (
    AugmentConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from flax_resnet.devices.parallel import Engine
from flax_resnet.kernels.cpu_convolution import compiler_options
from flax_resnet.models import create_from_config
from flax_resnet.models.folding import fold_batchnorm
from flax_resnet.training import steps
from flax_resnet.training.network import Network
from flax_resnet.weights import convert


def build(job: Job) -> Program:
    configure(job)
    config = make_config(job)
    engine = Engine(config.parallel, deterministic=job.variant == "deterministic")
    model = create_from_config(config.model, in_channels=3, bn_axis_name=engine.axis_name)
    with np.load(job.weights) as arrays:
        model = convert.load_state_dict(model, dict(arrays))
    network = Network(fold_batchnorm(model) if job.variant == "folded" else model)
    return (training if job.mode == "train" else inference)(job, config, engine, network)


def configure(job: Job):
    if job.variant == "deterministic" and job.device == "cpu":
        raise Skipped("the CPU is deterministic as it is")
    if job.variant == "folded" and job.mode == "train":
        raise Skipped("for inference only")
    jax.config.update("jax_enable_x64", job.dtype == "float64")
    if job.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # no TF32
    if jax.default_backend() != job.device:
        raise Skipped(f"JAX sees no {job.device.upper()} here")


def make_config(job: Job) -> TrainConfig:
    several = job.steps_per_dispatch if job.variant == "multi_step" else 1
    kind = "pmap" if job.variant == "pmap" else "jit"
    return TrainConfig(
        batch_size=job.batch_size,
        model=ModelConfig(
            arch=job.arch, stem=job.stem, num_classes=job.num_classes, dtype=job.dtype
        ),
        augment=AugmentConfig(random_crop=0),
        optimizer=OptimizerConfig(**timing.RULE, label_smoothing=timing.LABEL_SMOOTHING),
        schedule=ScheduleConfig(schedule="constant"),
        parallel=ParallelConfig(parallel=kind, devices=1, steps_per_dispatch=several),
    )


def training(job: Job, config: TrainConfig, engine: Engine, network) -> Program:
    step = steps.make_train_step(
        network,
        config,
        inputs.AsGiven(),
        num_classes=job.num_classes,
        steps_per_epoch=1,
        axis_name=engine.axis_name,
    )
    compiled, state, batch = place(job, engine, step, steps.make_state(network.initial, config))
    last = {"state": state}

    def dispatch():
        last["state"], last["metrics"] = compiled(last["state"], *batch)

    return Program(
        dispatch,
        lambda: jax.block_until_ready(last["state"]),
        lambda: np.ravel(last["metrics"]["loss"]).tolist(),
        config.parallel.steps_per_dispatch,
    )


def place(job: Job, engine: Engine, step, state):
    """The compiled step of the variant, with state and batch on the device."""
    images, labels = timing.synthetic_batch(job)
    index = np.arange(len(labels), dtype=np.int32)
    data = {"image": images, "label": labels.astype(np.int32)}
    if job.variant == "jit":
        compiled = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(job.device))
        return compiled, state, (jax.device_put(data | {"index": index}),)
    several = engine.steps_per_dispatch(resident=True)
    compiled = engine.compile_train(step, several)
    if several == 1:
        return compiled, engine.replicate(state), ({}, engine.shard([data | {"index": index}]))
    # All steps look up the same images, as training looks up a data set on the device.
    batches = engine.shard([{"index": index}] * several)
    return compiled, engine.replicate(state), (engine.replicate(data), batches)


def inference(job: Job, config: TrainConfig, engine: Engine, network) -> Program:
    if job.variant not in ("jit", "mesh", "folded"):
        raise Skipped("for training only")
    images, _ = timing.synthetic_batch(job)
    dtype = jnp.float64 if job.dtype == "float64" else jnp.float32
    variables, images = jax.device_put(network.initial), jax.device_put(images.astype(dtype))
    if job.variant == "mesh":
        variables, images = engine.replicate(variables), engine.shard([images])

    def forward(variables, images):
        return network.apply(variables, images, train=False)[0]

    compiled, last = jax.jit(forward, compiler_options=compiler_options(job.device)), {}

    def dispatch():
        last["logits"] = compiled(variables, images)

    return Program(
        dispatch,
        lambda: jax.block_until_ready(last["logits"]),
        lambda: np.ravel(np.asarray(last["logits"][: timing.CHECKED_IMAGES], np.float64)).tolist(),
    )


def measure_ceilings(job: Job) -> dict:
    configure(job)
    side, count = timing.ceiling_sizes(job)
    dtype = jnp.dtype(job.dtype)
    matrix, vector = (
        jax.random.normal(jax.random.key(0), shape, dtype) for shape in ((side, side), (count,))
    )
    product = jax.jit(jnp.dot, compiler_options=compiler_options(job.device))
    copy = jax.jit(lambda x: x + 1)
    last = {}

    def call(function, *arguments):
        last["result"] = function(*arguments)

    def finish():
        jax.block_until_ready(last["result"])

    seconds = timing.best_seconds(lambda: call(product, matrix, matrix), finish)
    copying = timing.best_seconds(lambda: call(copy, vector), finish)
    return {"flops": 2 * side**3 / seconds, "bytes": 2 * count * dtype.itemsize / copying}


def describe(job: Job) -> dict:
    return {"name": jax.devices()[0].device_kind, "jax": jax.__version__}


def peak_memory(job: Job) -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    timing.main(timing.Side(build, measure_ceilings, describe, peak_memory))
