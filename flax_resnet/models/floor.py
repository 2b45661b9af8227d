"""The fewest bytes of a training step in which no convolution is fused with its neighbours.

Counted in passes over arrays, each of which reads or writes an array once:

- a convolution reads its input and its kernel and writes its output; each of its two gradients
  reads two of the three and writes the third (nobody needs the gradient of the images);
- BatchNorm, with the ReLU behind it, takes 3 passes over its input forward (read for the
  statistics, read, write) and 5 backward (two reads for the sums, two reads and a write);
- a residual sum, with the ReLU behind it, takes 1 more pass over a block's output forward and 3
  backward (both gradients and the output read once, the masked gradient written for both readers);
- a max-pool reads its input and writes its output; its gradient reads both and the gradient of the
  output, and writes that of the input;
- images are read as bytes and written once; the update reads and writes parameters and momentum
  and reads the gradients, and the parameters are rounded to the type of the computation.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resnet.models.layers import BatchNorm, module_names
from flax_resnet.models.resnet import BasicBlock, Bottleneck
from flax_resnet.models.summary import recorded_activations

NORM_PASSES, SUM_PASSES, CONVOLUTION_PASSES, POOL_PASSES = 3 + 5, 1 + 3, 3, 3
UPDATE_BYTES = 4 * 5  # of a parameter: read and written, its momentum too, its gradient read
_TRACED = 2  # images; BatchNorm in training needs more than one value per channel


class Passes(NamedTuple):
    """Numbers of values that a training step reads or writes."""

    activations: int
    """Number of values of one image, which have the type of the computation."""

    image: int
    """Bytes of one image as it comes."""

    kernels: int
    """Number of values of the kernels of convolutions, for any number of images."""

    parameters: int

    def bytes(self, num_images: int, itemsize: int) -> int:
        """Bytes of a step of so many images in a type of so many bytes."""
        rounded = (4 + itemsize) * self.parameters if itemsize < 4 else 0
        update = UPDATE_BYTES * self.parameters + rounded
        images = num_images * (self.activations * itemsize + self.image)
        return images + self.kernels * itemsize + update


def passes(model: nnx.Module, image_shape: tuple[int, int, int]) -> Passes:
    """The passes of a network in training, found without computing.

    Args:
      model: may be abstract (`nnx.eval_shape`). It is made with `kernels="library"`, whose
        convolutions and pools are single operations.
      image_shape: `(H, W, C)`.
    """
    outputs, (graph, state) = {}, nnx.split(model)

    def forward(state, x):
        merged = nnx.merge(graph, state)
        with recorded_activations(merged) as recorded:
            logits = merged(x)
        outputs.update((name, output.size // _TRACED) for name, output in recorded.items())
        return logits

    images = jax.ShapeDtypeStruct((_TRACED, *image_shape), jnp.float32)
    traced = jax.make_jaxpr(forward)(state, images).jaxpr
    modules = module_names(model)
    convolutions = [_sizes(e) for e in _equations(traced, "conv_general_dilated")]
    pools = [_sizes(e) for e in _equations(traced, "reduce_window_max")]
    activations = math.prod(image_shape)  # the normalised images, written
    activations += sum(_passes_of(modules[name]) * size for name, size in outputs.items())
    activations += CONVOLUTION_PASSES * sum(image + output for image, *_, output in convolutions)
    activations -= sum(image + output for image, *_, output in convolutions[:1])
    activations += POOL_PASSES * sum(image + output for image, *_, output in pools)
    return Passes(
        activations=activations,
        image=math.prod(image_shape),
        kernels=CONVOLUTION_PASSES * _TRACED * sum(kernel for _, kernel, _ in convolutions),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
    )


def _passes_of(module: nnx.Module) -> int:
    """Passes over the output of a module, beside those of convolutions."""
    if isinstance(module, BatchNorm):
        return NORM_PASSES
    return SUM_PASSES if isinstance(module, BasicBlock | Bottleneck) else 0


def _equations(jaxpr, name: str) -> Iterator:
    """The operations of this name in a traced function and those that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner, name)


def _sizes(equation) -> list[int]:
    """Values of an operation's operands and its result, of one image."""
    arrays = [*equation.invars, *equation.outvars]
    return [array.aval.size // _TRACED for array in arrays]
