"""Optimizers equal torch.optim's in float64, for every option and at every update.

Updates and states are compared as well as parameters, because a fault of Adam may change a step by
1e-5 and a weight by 1e-8.
"""

import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import torch_ref.optim
from equivalence_tests.parity import inputs, tolerances, torch_side
from flax_resnet.config import OptimizerConfig, TrainConfig
from flax_resnet.interop.training_state import named_arrays, optimizer_arrays
from flax_resnet.training import optim, steps
from flax_resnet.training.network import Variables
from flax_resnet.weights import convert

pytestmark = pytest.mark.quick

STEPS = 24
COPIED = 5  # updates that the average copies where it starts after a warm-up
CYCLED = "cycle_momentum"
SHAPES = {"conv.weight": (3, 2, 3, 3), "bn.weight": (5,), "fc.weight": (4, 5), "fc.bias": (4,)}


def tree(arrays: dict) -> dict:
    """Converts arrays with torch's names and layouts to nested NNX leaves."""
    leaves = {"conv.weight": "kernel", "bn.weight": "scale", "fc.weight": "kernel"}
    nested = {}
    for name, array in arrays.items():
        module, leaf = name.split(".")
        leaf = leaves.get(name, leaf)
        layout = convert.to_nnx_layout((module, leaf), array)
        nested.setdefault(module, {})[leaf] = jnp.asarray(layout)
    return nested


def numbers(seed=0):
    """Parameters, and gradients of every step; norms range from 1e-9, near Adam's eps, to 30."""
    rng = inputs.random_numbers(seed)
    params = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    sizes = 10.0 ** rng.uniform(-9, 1, STEPS)
    sizes[:4] = 1, 1e-8, 10, 1e-2
    return params, [
        {name: size * rng.standard_normal(shape) for name, shape in SHAPES.items()}
        for size in sizes
    ]


def rates() -> np.ndarray:
    """The learning rate of every step; it jumps, because some rules differ only then."""
    return 0.01 * 0.3 ** (np.arange(STEPS) // 7)


def momenta() -> np.ndarray:
    """The momentum of every step, for rules with CYCLED."""
    return 0.9 + 0.05 * np.cos(np.arange(STEPS))


def set_momentum(group: dict, momentum: float):
    """Set the momentum (Adam: beta1) of a parameter group, as OneCycleLR does."""
    if "betas" in group:
        group["betas"] = (momentum, group["betas"][1])
    else:
        group["momentum"] = momentum


def run_torch(rule: dict) -> list[dict]:
    """Parameters, state and moving average after every step in PyTorch."""
    params, gradients = numbers()
    model = nn.Module()
    model.conv = nn.Conv2d(2, 3, 3, bias=False)
    model.bn, model.fc = nn.BatchNorm2d(5), nn.Linear(5, 4)
    model.bn.register_parameter("bias", None)
    model.double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(params[name]))
    config = OptimizerConfig(**{k: v for k, v in rule.items() if k != CYCLED})
    accumulate = config.accumulate_steps
    optimizer = torch_ref.optim.make_optimizer(model, config)
    factors = [group["lr"] / config.lr for group in optimizer.param_groups]
    ema = torch_ref.optim.make_ema(model, rule["ema_decay"]) if "ema_decay" in rule else None
    copied = COPIED if config.ema_after_warmup else 0
    seen = []
    for step, (gradient, lr) in enumerate(zip(gradients, rates(), strict=True)):
        if step % accumulate == 0:
            optimizer.zero_grad()
        for name, parameter in parameters.items():
            share = torch.tensor(gradient[name]) / accumulate
            parameter.grad = share if parameter.grad is None else parameter.grad + share
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = lr * factor
            if CYCLED in rule:
                set_momentum(group, momenta()[step])
        if (step + 1) % accumulate == 0:
            if "clip_norm" in rule and rule.get("optimizer") != "lamb":
                nn.utils.clip_grad_norm_(model.parameters(), rule["clip_norm"])
            optimizer.step()
            if ema:
                torch_ref.optim.take_average(ema, model, config, step // accumulate, copied)
        state = torch_side.optimizer_state(optimizer, parameters)
        seen.append({n: p.detach().numpy().copy() for n, p in parameters.items()})
        seen[-1] |= {n: a.copy() for n, a in state.items()}
        if ema and step + 1 >= accumulate:
            averages = dict(zip(params, ema.module.parameters(), strict=True))
            seen[-1] |= {f"{n} ema": p.detach().numpy().copy() for n, p in averages.items()}
    return seen


def run_jax(rule: dict) -> list[dict]:
    """Parameters, state and moving average after every step of `steps.apply_gradients`."""
    params, gradients = numbers()
    options = {name: value for name, value in rule.items() if name != CYCLED}
    config = TrainConfig(optimizer=OptimizerConfig(**options))
    state = steps.make_state(Variables(tree(params), {}, {}), config)
    copied = COPIED if config.optimizer.ema_after_warmup else 0

    @jax.jit
    def update(state, gradient, lr, momentum):
        return steps.apply_gradients(state, gradient, {}, config, lr, momentum, copied)

    seen = []
    cycle = momenta() if CYCLED in rule else [None] * STEPS
    for gradient, lr, momentum in zip(gradients, rates(), cycle, strict=True):
        state = update(state, tree(gradient), lr, momentum)
        optimizer = optimizer_arrays(state.opt_state, config.optimizer.optimizer)
        seen.append(named_arrays(state.params) | optimizer)
        if state.ema and state.step >= config.optimizer.accumulate_steps:
            averages = named_arrays(state.ema)
            seen[-1] |= {f"{name} ema": array for name, array in averages.items()}
    return seen


def differences(rule: dict) -> list[str]:
    """Step and name of every array that differs."""
    found, before = [], [numbers()[0]] * 2
    for step, after in enumerate(zip(run_jax(rule), run_torch(rule), strict=True)):
        states = [now | updates(now, last) for now, last in zip(after, before, strict=True)]
        found += [f"step {step}: {name}" for name in unlike(*states)]
        before = after
    return found


def updates(now: dict, last: dict) -> dict:
    return {f"{name} update": now[name] - last[name] for name in SHAPES}


def unlike(got: dict, expected: dict) -> list[str]:
    """Names of arrays that differ by more than the bound."""
    # Optax has a state before the first update, torch only after it.
    updated = any(np.any(expected[f"{name} update"]) for name in SHAPES)
    names = expected.keys() | got.keys() if updated else expected.keys()
    return sorted(name for name in names if not close(name, got, expected))


def close(name: str, got: dict, expected: dict) -> bool:
    if name not in got or name not in expected:
        return False
    bound = tolerances.RULES * np.linalg.norm(expected[name])
    if parameter := name.removesuffix(" update") if name.endswith("update") else None:
        # The difference of two weights carries the rounding of a weight.
        bound += np.finfo(float).eps * np.linalg.norm(expected[parameter])
    return bool(np.linalg.norm(got[name] - expected[name]) <= bound)


SGD = [
    dict(momentum=m, nesterov=n, weight_decay=d)
    for m, n, d in itertools.product((0.0, 0.9), (False, True), (0.0, 0.1))
]
ADAM = [dict(optimizer=o, weight_decay=d) for o in ("adam", "adamw") for d in (0.0, 0.1)]
RMSPROP = [
    dict(optimizer="rmsprop", momentum=m, centered=c, weight_decay=d)
    for m, c, d in itertools.product((0.0, 0.9), (False, True), (0.0, 0.1))
]
EVERY = [
    dict(optimizer=o, weight_decay=0.1, centered=o == "rmsprop")
    for o in ("sgd", "adam", "adamw", "rmsprop")
]
MORE = [
    dict(decoupled_weight_decay=True),
    dict(decay_norm_and_bias=False),
    dict(decay_norm_and_bias=False, decoupled_weight_decay=True),
    dict(clip_norm=1.0),
    dict(clip_norm=1e9),
    dict(accumulate_steps=3),
    dict(accumulate_steps=3, clip_norm=1.0),
    dict(ema_decay=0.9),
    dict(ema_decay=0.9, accumulate_steps=2),
    {CYCLED: True},
]
RULES = SGD + ADAM + RMSPROP + [a | b for a, b in itertools.product(EVERY, MORE)]
RULES += [
    dict(optimizer="adam", beta1=0.5, beta2=0.9, eps=1e-3),
    dict(optimizer="rmsprop", alpha=0.5),
]


RULES += [
    dict(ema_decay=0.9, ema_steps=3),
    dict(ema_decay=0.9, ema_steps=2, ema_after_warmup=True, accumulate_steps=2),
    dict(norm_weight_decay=0.3),
    dict(optimizer="adamw", norm_weight_decay=0.0),
    dict(optimizer="adamw", head_lr=0.4),
    dict(head_lr=0.001, norm_weight_decay=0.0),
]
LAMB = [
    {},
    dict(weight_decay=0.0),
    dict(clip_norm=1.0, eps=1e-6),
    dict(decay_norm_and_bias=False, clip_norm=1.0),
    dict(norm_weight_decay=0.0, head_lr=0.4, accumulate_steps=2),
]
RULES += [dict(optimizer="lamb", weight_decay=0.1) | options for options in LAMB]


def label(rule: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in rule.items())


@pytest.mark.parametrize("rule", RULES, ids=label)
def test_every_update_and_state_is_torchs(rule, x64):
    if rule.get("optimizer") == "lamb":
        pytest.importorskip("timm")
    assert differences(rule) == []


@pytest.mark.control
def test_gradients_lie_on_both_sides_of_every_threshold():
    norms = [math.sqrt(sum((g**2).sum() for g in step.values())) for step in numbers()[1]]
    assert min(norms) < 1e-7 and max(norms) > 10  # of Adam's eps, and of clip_norm
    assert len(set(rates())) > 2


def eps_inside(decay, eps, eps_in_sqrt):
    return RMS(decay, eps, eps_in_sqrt=True)


def no_epsilon_in_clip(max_norm):
    return optax.clip_by_global_norm(max_norm)


def decay_after_momentum(config, momentum):
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(optax.trace(config.momentum, config.nesterov), decay)


RMS = optax.scale_by_rms
ADAM_RULE = optax.scale_by_adam
FAULTS = {
    "eps inside RMSprop's root": (optax, "scale_by_rms", eps_inside, dict(optimizer="rmsprop")),
    "eps inside Adam's root": (
        optax,
        "scale_by_adam",
        lambda b1, b2, eps: ADAM_RULE(b1, b2, 0.0, eps_root=eps**2),
        dict(optimizer="adam"),
    ),
    "Optax's clipping": (optim, "clip_by_global_norm", no_epsilon_in_clip, dict(clip_norm=1.0)),
    "EMA starts at zero": (
        steps,
        "_moving_average",
        lambda ema, params, batches, config, copied: jax.tree.map(
            lambda old, new: 0.9 * old * (batches > 0) + 0.1 * new, ema, params
        ),
        dict(ema_decay=0.9),
    ),
    "gradients summed": (
        optim,
        "accumulate",
        lambda rule, n, dtype: optax.MultiSteps(rule, n, use_grad_mean=False),
        dict(accumulate_steps=3),
    ),
    "biases spared": (
        optim,
        "_decay_mask",
        lambda config: lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        dict(weight_decay=0.1),
    ),
    "decay decoupled": (optim, "_direction", decay_after_momentum, dict(weight_decay=0.1)),
}


@pytest.mark.control
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, x64):
    module, name, wrong, rule = FAULTS[fault]
    with mock.patch.object(module, name, wrong):
        assert differences(rule) != []
