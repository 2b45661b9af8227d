"""Checks that the graph of a PyTorch network has the gradients of the network itself.

`torch.export` keeps operations alone. It loses the backward function of a torch.autograd.Function
and the end of a gradient in torch.no_grad().
"""

import torch
from torch import nn

from equivalence_tests.parity.ports.graph import Graph
from flax_resnet.errors import InputError

APART = 1e-3
"""Relative difference above which two gradients are not the same. The network itself computes in
float32 where its author says so, the graph in float64."""

NOISE = 1e-6
"""Share of the largest gradient below which a difference may be rounding: of 0, for example, which
is the gradient of the bias of attention's keys, where the network's author wrote float32."""


def check(net: nn.Module, graph: Graph, images: torch.Tensor):
    """Compares the gradients of a network that draws nothing with those of its graph.

    Args:
      net: a copy that may be changed.

    Raises:
      InputError: they differ.
    """
    sources = {n: p.requires_grad_() for n, p in net.named_parameters() if p.is_floating_point()}
    sources["images"] = images = images.detach().requires_grad_()
    held = net.state_dict(keep_vars=True) | dict(net.named_buffers())
    values = {v: held[n] if n in sources else held[n].clone() for n, v in graph.leaves.items()}
    values[graph.images] = images
    found = graph.evaluate(values, graph.needed([graph.logits]))[graph.logits]
    expected = net(images * 1)  # the network may change its input in place
    ours, theirs = (_gradients(logits, sources) for logits in (found, expected))
    least = NOISE * max(gradient.norm() for gradient in theirs)
    for name, got, own in zip(sources, ours, theirs, strict=True):
        if (got - own).norm() > max(APART * own.norm(), least):
            raise InputError(
                f"the PyTorch network's gradient of {name} is not that of its operations; a"
                " torch.autograd.Function and torch.no_grad cannot be followed (detach() can)"
            )


def _gradients(logits, sources) -> list[torch.Tensor]:
    if not logits.requires_grad:
        return [torch.zeros_like(a) for a in sources.values()]
    weights = torch.linspace(1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    total = (logits * weights).sum()
    found = torch.autograd.grad(total, list(sources.values()), allow_unused=True)
    return [torch.zeros_like(a) if g is None else g
            for a, g in zip(sources.values(), found, strict=True)]  # fmt: skip
