"""Traces random valid configs whose fields lie at the edges of their ranges.

python -m equivalence_tests.studies.edges --count 2000 --json results/edges.json
"""

import argparse
import collections
import functools
import math
import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pydantic

from flax_resnet.commands import exits, output_files
from flax_resnet.config import INT32, SMALLEST, TrainConfig, from_dict, to_dict
from flax_resnet.data import augment
from flax_resnet.errors import InputError
from flax_resnet.models import create_from_config
from flax_resnet.training import optim, steps
from flax_resnet.training.network import Network, Preprocess

ARCHITECTURES = ("basic_cnn",) * 8 + ("resnet20", "resnet18")
FIXED = ("new_head", "freeze_backbone", "ema", "mean", "std", "num_classes")
STEPS_PER_EPOCH = (1, 2, 3, 80, 40_000)


def edges(schema: dict) -> list:
    """Values of a field from its JSON schema: both ends of its range and their neighbours."""
    if "anyOf" in schema:
        return [value for option in schema["anyOf"] for value in edges(option)]
    if "enum" in schema:
        return schema["enum"]
    if "prefixItems" in schema:
        first, *_, last = zip(*(edges(item) for item in schema["prefixItems"]), strict=True)
        return [list(first), [first[0], last[-1]], list(last)]
    if schema["type"] == "array":
        low, *_, high = edges(schema["items"])
        return [[low], [low, high]]
    if schema["type"] in ("integer", "number"):
        return _ends(schema, 1 if schema["type"] == "integer" else 0)
    return {"boolean": [False, True], "null": [None], "string": []}[schema["type"]]


def _ends(schema, step):
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    inner = [low + step, high - step] if step else [low or SMALLEST, math.nextafter(high, low)]
    if not step and "exclusiveMinimum" in schema:
        inner[0] = math.nextafter(low, high)
    ends = [low] * ("minimum" in schema) + inner + [high] * ("maximum" in schema)
    return sorted(set(ends))


@functools.cache
def fields() -> dict[tuple, list]:
    """{(group, field): its edges}; top-level fields have the group ""."""
    schema = pydantic.TypeAdapter(TrainConfig).json_schema()
    groups = {"": schema["properties"]}
    for name, field in schema["properties"].items():
        if "$ref" in field:
            groups[name] = schema["$defs"][field["$ref"].rpartition("/")[2]]["properties"]
    return {
        (group, name): edges(field)
        for group, properties in groups.items()
        for name, field in properties.items()
        if "$ref" not in field and name not in FIXED and edges(field)
    }


def draw(rng: random.Random) -> TrainConfig:
    """A valid config in which about a third of the fields lie at an edge."""
    while True:
        values = to_dict(TrainConfig())
        for (group, name), at_edge in fields().items():
            if rng.random() < 1 / 3:
                (values[group] if group else values)[name] = rng.choice(at_edge)
        values["model"] |= {"arch": rng.choice(ARCHITECTURES), "num_classes": 10}
        try:
            return from_dict(values)
        except InputError:  # fields that exclude each other
            continue


def trace(config: TrainConfig, steps_per_epoch: int):
    """Trace a run of this config, from creating the network to its last update.

    Raises:
      InputError: the network does not take the images.
      ArithmeticError: a value used in a step is not finite.
    """
    with jax.enable_x64(config.model.dtype == "float64"):
        size, batch = config.data.image_size or 16, config.batch_size
        shapes = {"image": (batch, size, size, 1), "label": (batch,), "index": (batch,)}
        kinds = {"image": jnp.uint8, "label": jnp.int32, "index": jnp.int32}
        batch = {name: jax.ShapeDtypeStruct(shapes[name], kinds[name]) for name in shapes}
        jax.eval_shape(lambda batch: _first_step(config, steps_per_epoch, batch), batch)
        _check_values(config, steps_per_epoch)


def _first_step(config, steps_per_epoch, batch):
    model = create_from_config(config.model, in_channels=1, seed=config.seed, bn_axis_name=None)
    network = Network(model)
    step = steps.make_train_step(
        network,
        config,
        Preprocess((0.5,), (0.5,)),
        num_classes=config.model.num_classes,
        steps_per_epoch=steps_per_epoch,
    )
    return step(steps.make_state(network.initial, config), batch)


def _check_values(config, steps_per_epoch):
    """Check that rates, momenta, mixup's share and an update by zero gradients are finite."""
    accumulate = config.optimizer.accumulate_steps
    an_epoch = steps_per_epoch / accumulate
    rate = optim.make_schedule(config.schedule, config.optimizer.lr, an_epoch, config.epochs)
    momentum = optim.make_momentum_schedule(config.schedule, an_epoch, config.epochs)
    zeros = {"fc": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
    last = config.epochs * steps_per_epoch // accumulate
    found = {"mixup": augment.draw_mixup(jax.random.key(0), config.augment.mixup or 1.0)}
    for update in {0, 1, last - 1, last}:
        update = jnp.asarray(max(update, 0), jnp.int32)
        found["learning rate"] = rate(update)
        found["momentum"] = momentum and momentum(update)
        optimizer = optim.make_optimizer(
            config.optimizer, learning_rate=found["learning rate"], momentum=found["momentum"]
        )
        found["update"], _ = optimizer.update(zeros, optimizer.init(zeros), zeros)
        for name, values in found.items():
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(values)):
                raise ArithmeticError(f"{name} of update {update} is not finite")


def survey(count: int, seed: int) -> dict:
    """Traces `count` configs: {"traced", "refused": counts, "faults": [{"config", "error"}]}."""
    rng, found, faults = random.Random(seed), collections.Counter(traced=0, refused=0), []
    for _ in range(count):
        config = draw(rng)
        an_epoch = rng.choice([n for n in STEPS_PER_EPOCH if n * config.epochs <= INT32])
        try:
            trace(config, an_epoch)
            found["traced"] += 1
        except InputError:
            found["refused"] += 1
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"[:500]
            faults.append({"config": to_dict(config), "steps": an_epoch, "error": fault})
    return {**found, "faults": faults}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = survey(args.count, args.seed) | {"seed": args.seed, "command": exits.command_line()}
    print(f"{found['traced']} traced, {found['refused']} refused, {len(found['faults'])} faults")
    for fault in found["faults"][:10]:
        print(fault["error"].splitlines()[0], file=sys.stderr)
    if args.json:
        output_files.write_json(args.json, found)
    if found["faults"]:
        count = len(found["faults"])
        raise exits.CheckFailed(f"{count} of {args.count} configs end in a traceback")


if __name__ == "__main__":
    exits.run_command(main)
