"""A PyTorch network as a graph, from `torch.export`: pure operations with their modules' names.

The graph computes in float64 where the network's author wrote a narrower float.
"""

import contextlib
import copy
import functools
import itertools
import operator
import warnings
from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_map

from equivalence_tests.parity import outputs
from equivalence_tests.parity.ports import backward, draws, wide, written
from equivalence_tests.parity.ports.graph import Graph, Operation
from flax_resnet.errors import InputError

BATCH_NORM = "batch_norm"
"""Name of BatchNorm's operation, `batch_norm` below."""


def graph(
    net: nn.Module, image_shape: tuple[int, ...], *, train: bool, classes: Collection[int] = ()
) -> Graph:
    """The graph of a float64 network for images `[B, C, H, W]`; the network stays as it is.

    Args:
      classes: numbers of classes, by which one of several values is chosen as the logits.

    Raises:
      InputError: the network raises, or `torch.export` cannot follow it.
    """
    net = copy.deepcopy(net).train(train)
    given = image_shape[0], torch.is_floating_point, "the PyTorch network", classes
    others = []

    def logits(module, inputs, output):
        chosen = outputs.logits(output, *given)
        others[:] = outputs.others(output, chosen, torch.is_floating_point)
        return chosen

    net.register_forward_hook(logits)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # attention as one opaque operation
    images = torch.zeros(image_shape, dtype=torch.float64)
    try:
        with torch.no_grad(), warnings.catch_warnings(), _raising(images):
            warnings.simplefilter("ignore")
            net(images + torch.randn_like(images))
            program = torch.export.export(net, (images,), strict=False).run_decompositions({})
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    builder = _Builder(program)
    found = builder.graph()._replace(others=tuple(others))
    drawn = {i for i, o in enumerate(found.operations) if o.name == draws.DRAW and not train}
    forbidden = (builder.random | drawn) & set(found.needed([found.logits]))
    if forbidden:
        mode, operation = "training" if train else "evaluation", found.operations[min(forbidden)]
        where = f" at {operation.module}" if operation.module else ""
        raise InputError(
            f"the PyTorch network draws random numbers in {mode} ({operation.name}{where})"
        )
    draws_numbers = any(operation.name == draws.DRAW for operation in found.operations)
    if not draws_numbers and not builder.narrow:
        with _raising(images):
            backward.check(net, found, images + torch.randn_like(images))
    return found


def classes(net: nn.Module, images: torch.Tensor) -> set[int]:
    """Numbers of classes that the network may have, of all values that may be its logits."""
    with torch.no_grad(), _raising(images):
        output = net.eval()(images)
    found = outputs.candidates(output, len(images), torch.is_floating_point)
    return {value.shape[1] for value in found.values()}


@contextlib.contextmanager
def _raising(images):
    """Whatever the user's own code raises is an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        size = "x".join(map(str, images.shape[1:]))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the PyTorch network raises on images of {size}: {reason}") from error


class _Builder:
    """Translates an exported program."""

    def __init__(self, program):
        self.program, self.operations, self.constants = program, [], {}
        self._numbers = itertools.count()
        self._values, self._several = {}, {}
        self.random: set[int] = set()
        self.narrow = False  # True if an eps is that of float32 instead of the network's own

    def graph(self) -> Graph:
        signature = self.program.graph_signature
        names = signature.inputs_to_parameters | signature.inputs_to_buffers
        held = signature.inputs_to_lifted_tensor_constants
        leaves, images = {}, None
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                value = self._values[node] = next(self._numbers)
                if node.name in names:
                    if node.users:  # else another name of a tensor that is used
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
        if name in ("conv1d", "conv2d", "conv_transpose2d", "linear"):
            self._product(node, name)
        elif name.startswith("_native_batch_norm_legit"):
            self._batch_norm(node)
        elif name == "dropout":
            self._values[node] = self._dropout(node, node.meta["val"])
        elif name == "native_dropout":
            self._several[node] = {0: self._dropout(node, node.meta["val"][0])}
        elif name == "bernoulli" and len(node.args) == 2:
            self._values[node] = self._mask(node, node.meta["val"].shape, node.args[1])
        elif name in ("rand", "rand_like"):
            self._values[node] = self._draw(node, node.meta["val"].shape)
        elif name == "scaled_dot_product_attention" and len(node.args) > 4 and node.args[4]:
            self._values[node] = self._attention(node)
        elif node.target is operator.getitem and node.args[0] in self._several:
            self._values[node] = self._several[node.args[0]][node.args[1]]
        elif name == "hardsigmoid":
            self._values[node] = self._add(name, _hard_sigmoid, [node.args[0]], node)
        else:
            if name == "rms_norm":
                self.narrow |= len(node.args) < 4 or node.args[3] is None
                node.args, node.kwargs = _with_eps(*node.args, **node.kwargs), {}
            drawing = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            if drawing and name != "scaled_dot_product_attention":  # a rate of 0
                self.random.add(len(self.operations))
            self._values[node] = self._add(name, _function(node), node.all_input_nodes, node)

    def _draw(self, node, shape) -> int:
        seed = 1, len(self.operations)

        def run():
            return (torch.from_numpy(draws.numbers(*seed, shape=shape)),)

        return self._add(draws.DRAW, run, [], node, options={"shape": tuple(shape)})

    def _mask(self, node, shape, share: float) -> int:
        def run(drawn):
            return ((drawn < share).double(),)

        options = {"share": share, "shape": tuple(shape)}
        return self._add(draws.KEEP, run, [self._draw(node, shape)], node, options=options)

    def _dropout(self, node, output) -> int:
        x, rate, training = node.args
        if not training or rate == 0:
            return self._values[x]
        share = 1 - rate
        mask = self._mask(node, output.shape, share)
        return self._add("apply_mask", lambda x, mask: (x * mask / (share or 1),), [x, mask], node)

    def _attention(self, node) -> int:
        """Attention whose dropout is a mask of its own."""
        query, key, value, bias, rate, *causal = node.args
        shape = (*query.meta["val"].shape[:-1], key.meta["val"].shape[-2])
        mask = self._mask(node, shape, 1 - rate)

        def run(q, k, v, mask, bias=None):
            found, weights = torch.ops.aten._scaled_dot_product_attention_math(
                q, k, v, bias, 0.0, *causal, **node.kwargs
            )
            return (weights * mask / (1 - rate) @ v,)

        inputs = [query, key, value, mask, *([] if bias is None else [bias])]
        return self._add("scaled_dot_product_attention", run, inputs, node)

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
        if "no_stats" in str(node.target):
            rest, mean, variance = [mean, variance, *rest], None, None
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


def _with_eps(x, shape, weight=None, eps=None) -> tuple:
    """RMSNorm's arguments; by default its eps is that of float32, in which users compute."""
    return x, shape, weight, written.EPS if eps is None else eps


def _hard_sigmoid(x) -> tuple:
    """The gradient of PyTorch's own holds the float32 that is nearest to 1/6."""
    return (F.relu6(x + 3) / 6,)


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
    return torch.float64 if array in wide.NARROW else array


def lifted(tensor: torch.Tensor) -> torch.Tensor:
    """A float tensor in float64, with its numbers as their author wrote them."""
    if tensor.dtype not in wide.NARROW:
        return tensor.double()
    return torch.from_numpy(np.array(written.lifted(tensor.detach().float().numpy())))


def batch_norm(x, *leaves, training, momentum, eps, given, biased=False, by=None) -> tuple:
    """BatchNorm as a pure function: (y, running mean after, running variance after).

    Args:
      leaves: weight, bias, running mean and variance, as far as they are given.
      given: which of the four are.
      biased: the running variance takes the biased variance of the batch.
      by: (x, running mean, running variance) -> the mean and variance that x is normalised by,
        where these are not PyTorch's: of each channel, or of as many axes as x has.
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
    mean, variance = (a.reshape(shape) if a.ndim == 1 else a for a in (mean, variance))
    y = (x - mean) * (variance + eps).rsqrt()
    return y if weight is None else y * weight.reshape(shape) + bias.reshape(shape)


def batch_statistics(x, correction: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel, divided by n - correction."""
    axes = [a for a in range(x.ndim) if a != 1]
    return x.mean(axes), x.var(axes, correction=correction)


def batch_norm_of(operation: Operation, options: dict):
    """BatchNorm's operation with other options."""
    return functools.partial(batch_norm, **operation.options | options)
