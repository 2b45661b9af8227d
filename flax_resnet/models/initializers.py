"""PyTorch's initialisers of weights and biases."""

import math
from functools import partial

import jax
import jax.numpy as jnp

_CHUNK = 1 << 18


def kaiming_normal_fan_out(key, shape, dtype=jnp.float32, **_):
    """torch.nn.init.kaiming_normal_(mode="fan_out"): a full normal, `[kh, kw, I, O]`.

    Flax's he_normal is a truncated one scaled by fan_in. Drawn in chunks of one size: XLA takes
    a quarter of a second to compile the generator for every new shape.
    """
    std = math.sqrt(2 / (shape[0] * shape[1] * shape[-1]))
    count = -(-math.prod(shape) // _CHUNK)
    chunks = [_normal_chunk(key, number) for number in range(count)]
    return _assemble(chunks, shape, std, jnp.dtype(dtype))


@jax.jit
def _normal_chunk(key, number):
    return jax.random.normal(jax.random.fold_in(key, number), (_CHUNK,), jnp.float32)


@partial(jax.jit, static_argnums=(1, 3))
def _assemble(chunks, shape, scale, dtype):
    values = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks)
    return (scale * values[: math.prod(shape)]).reshape(shape).astype(dtype)


def uniform_fan_in(fan_in: int):
    """torch's default for the weight and the bias of Linear and Conv2d: U(+-1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32, **_):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
