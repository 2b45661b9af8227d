"""Inference without BatchNorm: its scale and shift become part of the convolution before it.

With its running statistics a BatchNorm is y * s + (bias - mean * s), s = scale / sqrt(var + eps),
one constant each a channel: a kernel times s and a bias do the same without another pass over the
activations.
"""

import numpy as np
from flax import nnx

from flax_resnet.models.layers import BatchNorm
from flax_resnet.models.resnet import Identity, Projection


def fold_batchnorm(model: nnx.Module) -> nnx.Module:
    """A copy in evaluation mode without BatchNorm; its logits are the same but for rounding."""
    model = nnx.clone(model)
    model.eval()
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Projection):
            convolution, norm = module.layers
            _fold(convolution, norm)
            module.layers = nnx.List([convolution, Identity()])
        for name in [name for name in vars(module) if name.startswith("bn")]:
            _fold(getattr(module, name.replace("bn", "conv")), getattr(module, name))
            setattr(module, name, Identity())
    return model


def _fold(convolution: nnx.Conv, norm: BatchNorm):
    """Fold in float64, so that only the result is rounded."""
    kernel, scale, bias, mean, var = (
        np.asarray(variable[...], np.float64)
        for variable in (convolution.kernel, norm.scale, norm.bias, norm.mean, norm.var)
    )
    scale = scale / np.sqrt(var + norm.epsilon)
    dtype = convolution.kernel[...].dtype
    convolution.kernel[...] = (kernel * scale).astype(dtype)
    convolution.bias = nnx.Param((bias - mean * scale).astype(dtype))
    convolution.use_bias = True
