"""A PyTorch network as a graph, from `torch.export`: pure operations with their modules' names.

The graph computes in float64 where the network's author wrote a narrower float.
"""

import contextlib
import copy
import functools
import itertools
import operator
import warnings
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_map

from equivalence_tests.parity.ports import written
from equivalence_tests.parity.ports.graph import Graph, Operation
from flax_resnet.errors import InputError

NARROW = (torch.float16, torch.bfloat16, torch.float32)

BATCH_NORM = "batch_norm"
"""Name of BatchNorm's operation, `batch_norm` below."""


def graph(net: nn.Module, image_shape: tuple[int, ...], *, train: bool) -> Graph:
    """The graph of a float64 network for images `[B, C, H, W]`; the network stays as it is.

    Raises:
      InputError: the network raises, or `torch.export` cannot follow it.
    """
    net = copy.deepcopy(net).train(train)
    net.register_forward_hook(lambda module, inputs, output: _logits(output))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # attention as one opaque operation
    images = torch.zeros(image_shape, dtype=torch.float64)
    try:
        with torch.no_grad(), warnings.catch_warnings(), _no_dropout():
            warnings.simplefilter("ignore")
            _check_logits(net(images + torch.randn_like(images)), len(images))
            program = torch.export.export(net, (images,), strict=False).run_decompositions({})
    except InputError:
        raise
    except Exception as error:  # whatever the user's own code raises
        size = "x".join(map(str, image_shape[1:]))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the PyTorch network raises on images of {size}: {reason}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    builder = _Builder(program)
    found = builder.graph()
    drawing = builder.random & set(found.needed([found.logits]))
    if drawing:
        mode, operation = "training" if train else "evaluation", found.operations[min(drawing)]
        where = f" at {operation.module}" if operation.module else ""
        raise InputError(
            f"the PyTorch network draws random numbers in {mode} ({operation.name}{where})"
        )
    return found


_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
             "feature_alpha_dropout")  # fmt: skip


@contextlib.contextmanager
def _no_dropout():
    """Functions that drop values return their input; modules are replaced by `drop_nothing`."""
    with contextlib.ExitStack() as stack:
        for name in _DROPOUTS:
            stack.enter_context(mock.patch.object(F, name, lambda input, *_, **__: input))
        yield


def _check_logits(output, batch: int):
    shape = getattr(output, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != batch or not output.is_floating_point():
        what = type(output).__name__ if shape is None else list(shape)
        raise InputError(f"the PyTorch network returns {what}, not logits [{batch}, classes]")


def _logits(output):
    """The logits in an output: its `logits`, or the first of several values."""
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, dict) and ("logits" in output or len(output) == 1):
        return output["logits" if "logits" in output else next(iter(output))]
    return output[0] if isinstance(output, tuple | list) and output else output


class _Builder:
    """Translates an exported program."""

    def __init__(self, program):
        self.program, self.operations, self.constants = program, [], {}
        self._numbers = itertools.count()
        self._values, self._several = {}, {}
        self.random: set[int] = set()

    def graph(self) -> Graph:
        signature = self.program.graph_signature
        names = signature.inputs_to_parameters | signature.inputs_to_buffers
        held = signature.inputs_to_lifted_tensor_constants
        leaves, images = {}, None
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                value = self._values[node] = next(self._numbers)
                if node.name in names:
                    leaves[names[node.name]] = value
                elif node.name in held:
                    self.constants[value] = _wide(self.program.constants[held[node.name]])
                else:
                    images = value
            elif node.op == "call_function":
                self._call(node)
        outputs = next(iter(reversed(self.program.graph.nodes))).args[0]
        changed = {signature.buffers_to_mutate.get(node.name): node for node in outputs}
        logits = [node for node in outputs if node.name in signature.user_outputs]
        if len(logits) != 1:
            raise InputError(f"the PyTorch network returns {len(logits)} tensors instead of logits")
        after = {
            name: self._values[changed[name]] if name in changed else value
            for name, value in leaves.items()
        }
        logits = self._values[logits[0]]
        return Graph(self.operations, leaves, images, logits, after, self.constants)

    def _call(self, node: fx.Node):
        name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
        if name in ("conv2d", "conv_transpose2d", "linear"):
            self._product(node, name)
        elif name.startswith("_native_batch_norm_legit"):
            self._batch_norm(node)
        elif name == "dropout":
            self._values[node] = self._values[node.args[0]]
        elif name == "native_dropout":
            self._several[node] = {0: self._values[node.args[0]]}
        elif node.target is operator.getitem and node.args[0] in self._several:
            self._values[node] = self._several[node.args[0]][node.args[1]]
        else:
            if name == "scaled_dot_product_attention":  # its fifth argument is a dropout's rate
                node.args = node.args[:4]
            elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                self.random.add(len(self.operations))
            self._values[node] = self._add(name, _function(node), node.all_input_nodes, node)

    def _product(self, node, name):
        """A kernel and its bias are two operations, as in JAX."""
        x, weight, bias, *rest = (*node.args, None) if len(node.args) < 3 else node.args
        keywords = {k: v for k, v in node.kwargs.items() if k != "bias"}
        bias = node.kwargs.get("bias", bias)

        def kernel(x, weight):
            return (node.target(x, weight, None, *rest, **keywords),)

        options = {"arguments": rest}
        if name == "conv_transpose2d":
            options["groups"] = rest[3] if len(rest) > 3 else keywords.get("groups", 1)
        product = self._add(name, kernel, [x, weight], node, options=options)
        if bias is None:
            self._values[node] = product
            return
        channel = -1 if name == "linear" else 1
        shape = [1] * len(node.meta["val"].shape)
        shape[channel] = -1

        def add(x, bias):
            return (x + bias.reshape(shape),)

        self._values[node] = self._add("add_bias", add, [product, bias], node)

    def _batch_norm(self, node):
        x, weight, bias, mean, variance, *rest = node.args
        training = "no_training" not in str(node.target) and rest.pop(0)
        momentum, eps = rest
        given = tuple(part is not None for part in (weight, bias, mean, variance))
        options = {"training": training, "momentum": momentum, "eps": eps, "given": given}
        run = functools.partial(batch_norm, **options)

        inputs = [part for part in (x, weight, bias, mean, variance) if part is not None]
        outputs = self._add(BATCH_NORM, run, inputs, node, count=3, options=options)
        y, new_mean, new_variance = outputs
        self._several[node] = {0: y, 3: new_mean, 4: new_variance}

    def _add(self, name, run, inputs, node, *, count=1, options=None):
        values = tuple(self._values[i] if isinstance(i, fx.Node) else i for i in inputs)
        outputs = tuple(next(self._numbers) for _ in range(count))
        options = options if options is not None else {"args": node.args, "kwargs": node.kwargs}
        self.operations.append(Operation(name, run, values, outputs, _module(node), options))
        return outputs[0] if count == 1 else outputs


def _module(node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def _function(node):
    """The node as a function of the arrays of its input nodes."""
    sources = node.all_input_nodes
    given = tree_map(_wide, (node.args, dict(node.kwargs)))

    def run(*arrays):
        table = dict(zip(sources, arrays, strict=True))
        args, kwargs = fx.map_arg(given, lambda n: table[n])
        return (node.target(*args, **kwargs),)

    return run


def _wide(array):
    """A type or a tensor in float64, where it is a narrower float."""
    if isinstance(array, torch.Tensor):
        return lifted(array) if array.is_floating_point() else array
    return torch.float64 if array in NARROW else array


def lifted(tensor: torch.Tensor) -> torch.Tensor:
    """A float tensor in float64, with its numbers as their author wrote them."""
    if tensor.dtype not in NARROW:
        return tensor.double()
    return torch.from_numpy(np.array(written.lifted(tensor.detach().float().numpy())))


def batch_norm(x, *leaves, training, momentum, eps, given, biased=False, by=None) -> tuple:
    """BatchNorm as a pure function: (y, running mean after, running variance after).

    Args:
      leaves: weight, bias, running mean and variance, as far as they are given.
      given: which of the four are.
      biased: the running variance takes the biased variance of the batch.
      by: (x, running mean, running variance) -> the mean and variance that x is normalised by,
        where these are not PyTorch's.
    """
    arrays = iter(leaves)
    weight, bias, mean, variance = (next(arrays) if part else None for part in given)
    old = mean, variance
    mean, variance = (None if a is None else a.clone() for a in old)
    y = F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    if biased and training and variance is not None:
        n = x.numel() / x.shape[1]
        kept = (1 - momentum) * old[1]
        variance = kept + (variance - kept) * (n - 1) / n
    if by:
        y = _normalised(x, *by(x, *old), weight, bias, eps)
    return y, mean, variance


def _normalised(x, mean, variance, weight, bias, eps):
    """F.batch_norm in evaluation; unlike it, this passes a gradient to the statistics."""
    shape = [1, -1, *[1] * (x.ndim - 2)]
    y = (x - mean.reshape(shape)) * (variance + eps).rsqrt().reshape(shape)
    return y if weight is None else y * weight.reshape(shape) + bias.reshape(shape)


def batch_statistics(x, correction: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel, divided by n - correction."""
    axes = [a for a in range(x.ndim) if a != 1]
    return x.mean(axes), x.var(axes, correction=correction)


def batch_norm_of(operation: Operation, options: dict):
    """BatchNorm's operation with other options."""
    return functools.partial(batch_norm, **operation.options | options)
