"""A network's activations by name, and its parameters and FLOPs by stage."""

import contextlib
import math

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table

from flax_resnet.models.layers import module_names


@contextlib.contextmanager
def recorded_activations(model: nnx.Module):
    """Within this context, calls of the model fill the dict that it yields.

    Yields:
      {"layer1.0.conv1": output, ...} for every submodule, in the order of their calls; the
      model itself is "".
    """
    names = {id(module): name for name, module in module_names(model).items()}
    classes = {type(m) for _, m in nnx.iter_modules(model) if callable(m)}
    originals = {cls: cls.__call__ for cls in classes}
    outputs = {}

    def recording(original):
        def call(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            if id(self) in names:
                outputs[names[id(self)]] = output
            return output

        return call

    try:
        for cls, original in originals.items():
            cls.__call__ = recording(original)
        yield outputs
    finally:
        for cls, original in originals.items():
            cls.__call__ = original


def stage_rows(model: nnx.Module, image_shape: tuple[int, int, int]) -> list[dict]:
    """A row for each top-level part: name, output shape of one image, parameters, FLOPs.

    Args:
      image_shape: `(H, W, C)`.

    Returns:
      FLOPs are 2 per multiply-add of convolutions and linear layers, for one image, forward.
    """
    model.eval()
    with recorded_activations(model) as outputs:
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    modules = module_names(model)
    rows = {}
    for name, output in outputs.items():
        if not name:
            continue
        row = rows.setdefault(name.split(".")[0], {"parameters": 0, "flops": 0})
        row["output"] = output.shape[1:]
        row["flops"] += _flops(modules[name], output.shape)
        row["parameters"] += _own_parameters(modules[name])
    return [{"name": name, **row} for name, row in rows.items() if row["parameters"]]


def summary_table(arch: str, rows: list[dict]) -> Table:
    """`stage_rows` for the terminal."""
    table = Table(title=f"{arch}, one image", title_justify="left")
    for header, justify in (("part", "left"), ("output", "left"), ("parameters", "right"),
                            ("MFLOPs", "right")):  # fmt: skip
        table.add_column(header, justify=justify)
    for row in rows:
        shape = " x ".join(map(str, row["output"]))
        table.add_row(row["name"], shape, f"{row['parameters']:,}", f"{row['flops'] / 1e6:,.1f}")
    total = {key: sum(row[key] for row in rows) for key in ("parameters", "flops")}
    table.add_section()
    table.add_row("total", "", f"{total['parameters']:,}", f"{total['flops'] / 1e6:,.1f}")
    return table


def _flops(module, shape) -> int:
    if isinstance(module, nnx.Conv | nnx.Linear):
        return 2 * math.prod(shape) * math.prod(module.kernel[...].shape[:-1])
    return 0


def _own_parameters(module) -> int:
    own = (v for v in vars(module).values() if isinstance(v, nnx.Param))
    return sum(v[...].size for v in own if v[...] is not None)
