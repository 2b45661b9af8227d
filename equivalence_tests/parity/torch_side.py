"""Runs a case in PyTorch: `torch_ref.steps.train_step`, observed by hooks."""

import contextlib
from unittest import mock

import numpy as np
import torch
from torch import nn

import torch_ref
from equivalence_tests.parity import replay
from equivalence_tests.parity.inputs import Case
from torch_ref import checkpoint, losses, optim, steps, training_state

optimizer_state = training_state.optimizer_arrays

RETURNED = "[logits]"
"""Name of the network's own output among the activations; no module can have it."""


def run(
    case: Case, dtype=np.float64, *, train=True, decisions=None, record=None, model=None
) -> dict:
    """Returns a trace (`engine.run_torch`)."""
    model = (model or make_model(case, dtype)).train(train)
    optimizer = optim.make_optimizer(model, case.optimizer)
    seen = {"loss": {}}
    for index in range(len(case.images)):
        with _deciding(decisions and decisions[index], record):
            one_step(model, optimizer, case, index, seen)
    return trace(model, optimizer, seen, train=train)


def make_model(case: Case, dtype=np.float64) -> nn.Module:
    """The twin, this project's PyTorch network, with the weights of the case."""
    with torch.device("meta"):
        model = torch_ref.create_model(
            case.arch,
            case.num_classes,
            case.images.shape[-1],
            stem=case.stem,
            dropout=case.dropout,
            shortcut=case.shortcut,
            batch_norm_images=case.batch_norm_images,
        )
    model.load_state_dict(checkpoint.to_tensors(case.arrays), assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.to(torch.from_numpy(np.zeros(0, dtype)).dtype)


def one_step(model, optimizer, case: Case, index: int, seen: dict, *, autocast=None) -> None:
    """Runs one batch forward and backward; in training mode it also updates the weights.

    Args:
      seen: receives forward, loss and gradient.
      autocast: torch.bfloat16 for mixed precision.
    """
    parameter = next(model.parameters())
    images = torch.from_numpy(case.images[index]).permute(0, 3, 1, 2).to(parameter.dtype)
    images = images.contiguous().requires_grad_()
    labels = torch.from_numpy(case.labels[index])
    mask = None if case.masks is None else case.masks[index]
    with (
        recorded_activations(model) as seen["forward"],
        replay.masked_torch(mask),
        _gradients_before_clipping(model, seen),
    ):
        if model.training:
            dtype = autocast or parameter.dtype
            loss = steps.train_step(
                model, optimizer, images, labels, case.optimizer, dtype=dtype, step=index
            )
        else:
            optimizer.zero_grad()
            smoothing = case.optimizer.label_smoothing
            loss = losses.cross_entropy(model(images), labels, label_smoothing=smoothing)
            loss.backward()
    seen["loss"][f"loss of step {index}"] = to_numpy(loss)
    unclipped = seen.pop("unclipped", None) or gradients(model)
    seen["gradient"] = unclipped | {"images": to_numpy(images.grad)}


def gradients(model) -> dict[str, np.ndarray]:
    """Gradients of all parameters in the order of the backward pass, last layer first."""
    return {n: to_numpy(p.grad) for n, p in reversed(list(model.named_parameters()))}


def _gradients_before_clipping(model, seen: dict):
    """Records gradients before torch clips them in place."""
    clip = nn.utils.clip_grad_norm_

    def recording(parameters, max_norm):
        seen["unclipped"] = gradients(model)
        return clip(parameters, max_norm)

    return mock.patch.object(nn.utils, "clip_grad_norm_", recording)


def trace(model, optimizer, seen: dict, *, train=True) -> dict:
    """`seen` and, after training, statistics, optimizer state and parameters.

    Arrays of the model share its memory; arrays of the optimizer are copies.
    """
    if not train:
        return seen
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    return seen | {
        "batch_norm": {n: a for n, a in state.items() if n not in parameters},
        "optimizer": optimizer_state(optimizer, parameters),
        "parameters": {n: a for n, a in state.items() if n in parameters},
    }


@contextlib.contextmanager
def recorded_activations(model: nn.Module):
    """Yields a dict that receives outputs [B, C, ...] by module name, in the order of the calls.

    The second call of a module is `name:2`; the network's own output is `RETURNED`.
    """
    outputs, counts = {}, {}

    def hook(name, output):
        counts[name] = counts.get(name, 0) + 1
        key = name or RETURNED
        key = key if counts[name] == 1 else f"{key}:{counts[name]}"
        # The global pool keeps [B, C, 1, 1], which JAX has as [B, C].
        flat = output.ndim == 4 and output.shape[2:] == (1, 1) and name.endswith("pool")
        outputs[key] = to_numpy(output.flatten(1) if flat else output)

    handles = [
        module.register_forward_hook(lambda m, i, output, name=name: hook(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def to_numpy(tensor) -> np.ndarray:
    """Copies a tensor to an array; bfloat16 becomes float32."""
    return checkpoint.to_arrays({"": tensor})[""]


def _deciding(decisions, record):
    if decisions is not None:
        return replay.replayed_torch(decisions)
    if record is not None:
        return _recording(record)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _recording(record):
    with replay.recorded_torch() as decisions:
        yield
    record.append(decisions)
