"""Faults of ports that little shows, and right ports that are easily taken for wrong ones."""

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from torch import nn

from equivalence_tests.parity import compare_models
from flax_resnet.errors import InputError

SIZE = (9, 12)


pytestmark = pytest.mark.usefixtures("ranks_are_promoted")


class Torch(nn.Module):
    """Two dense layers and whatever a test puts between them or around them."""

    def __init__(self, classes=4, before=None, middle=None, between=torch.tanh, after=None):
        super().__init__()
        self.before, self.middle = before or nn.Identity(), middle or nn.Identity()
        self.fc1, self.fc2 = nn.Linear(3, 16), nn.Linear(16, classes)
        self.between, self.after = between, after

    def forward(self, x):
        hidden = self.between(self.fc1(self.before(x).mean((2, 3))))
        logits = self.fc2(self.middle(hidden))
        return logits if self.after is None else self.after(self, hidden, logits)


def port(classes=4, before=lambda x: x, between=jnp.tanh, after=lambda x: x, update=None):
    """The same in JAX."""

    def apply(variables, images, train):
        x = before(images).mean((1, 2))
        x = between(x @ variables["a"] + variables["b"])
        logits = after(x @ variables["c"] + variables["d"])
        return logits, update(variables) if update and train else variables

    shapes = {"a": (3, 16), "b": 16, "c": (16, classes), "d": classes}
    return apply, {name: jnp.zeros(shape) for name, shape in shapes.items()}


def judged(jax_net, torch_net, **options):
    return compare_models(jax_net, torch_net, image_size=SIZE, **options)


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.control
def test_a_stopped_gradient_is_found_with_one_logit_too(classes):
    stopped = port(classes, between=lambda x: jax.lax.stop_gradient(jnp.tanh(x)))
    assert judged(stopped, Torch(classes)).verdict == "divergent"
    assert judged(port(classes), Torch(classes)).verdict == "equal"


@pytest.mark.control
@pytest.mark.parametrize(
    "ours,theirs,verdict",
    [
        (optax.sgd(0.5), lambda p: torch.optim.SGD(p, 0.1), "divergent"),
        (optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.1)),
         lambda p: torch.optim.SGD(p, 0.1), "divergent"),
        (optax.adam(1e-3), lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True), "divergent"),
        (optax.adam(1e-3, eps=1e-7), lambda p: torch.optim.Adam(p, 1e-3), "divergent"),
        (optax.radam(1e-3), lambda p: torch.optim.RAdam(p, 1e-3), "divergent"),
        (optax.adafactor(1e-3), lambda p: torch.optim.Adafactor(p, 1e-3), "divergent"),
        (optax.adam(1e-3), lambda p: torch.optim.Adam(p, 1e-3), "equal"),
        (optax.MultiSteps(optax.sgd(0.1), 1), lambda p: torch.optim.SGD(p, 0.1), "equal"),
    ],
)  # fmt: skip
def test_optimizers_are_compared_on_gradients_of_many_sizes(ours, theirs, verdict):
    report = judged(port(1), Torch(1), optax_optimizer=ours, torch_optimizer=theirs)
    assert report.verdict == verdict, str(report)


def test_a_buffer_of_another_scale_with_equal_parameters_is_told_so():
    """Optax applies the learning rate before the momentum here; they part when the rate changes."""
    ours = optax.chain(optax.scale(-0.1), optax.trace(0.9))
    report = judged(
        port(1), Torch(1), optax_optimizer=ours,
        torch_optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    )  # fmt: skip
    assert report.verdict == "divergent"
    assert "the parameters agree, at this learning rate" in str(report)


@jax.custom_vjp
def _wrong(x):
    return x


_wrong.defvjp(lambda x: (x, None), lambda _, g: (-3.0 * g,))


@jax.custom_vjp
def _right(x):
    return jnp.tanh(x)


_right.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


@pytest.mark.parametrize("narrow", [jnp.float32, jnp.bfloat16])
@pytest.mark.control
def test_a_backward_rule_of_its_own_is_checked_beside_narrow_floats(narrow):
    cast = {"before": lambda x: x.astype(narrow)}
    with pytest.raises(InputError, match=r"custom_vjp has a backward rule"):
        judged(port(**cast, between=lambda x: _wrong(jnp.tanh(x))), Torch())
    assert judged(port(**cast, between=_right), Torch()).verdict == "equal"


@jax.custom_vjp
def _scaled(x, mask, factor):
    return x * mask * factor


def _scaled_backward(rest, g):
    mask, factor, x = rest
    return g * mask * factor, None, (g * x * mask).sum()


_scaled.defvjp(lambda x, mask, factor: (x * mask * factor, (mask, factor, x)), _scaled_backward)


@pytest.mark.parametrize("narrow", [jnp.float32, jnp.bfloat16])
def test_right_rules_with_constants_are_no_obstacle(narrow):
    def between(x):
        return _scaled(jnp.tanh(x), jnp.ones_like(x), 1.5)

    net = Torch(between=lambda x: torch.tanh(x) * 1.5)
    report = judged(port(before=lambda x: x.astype(narrow), between=between), net)
    assert report.verdict == "equal", str(report)


@pytest.mark.control
def test_what_only_the_training_step_of_jax_changes_is_a_difference():
    halved = port(update=lambda v: v | {"a": 0.5 * v["a"]})
    report = judged(halved, Torch())
    assert report.verdict == "divergent" and report.faults[0].phase == "batch_norm"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x.mean((2, 3)))))))


def tied(second=lambda kernel: kernel):
    def apply(v, images, train):
        x = jnp.tanh(images.mean((1, 2)) @ v["k"] + v["a"])
        return jnp.tanh(x @ second(v["k"]) + v["b"]) @ v["h"] + v["c"], v

    shapes = {"k": (3, 3), "a": 3, "b": 3, "h": (3, 4), "c": 4}
    return apply, {name: jnp.zeros(shape) for name, shape in shapes.items()}


def of_tied(state):
    names = {"a": "a.bias", "b": "b.bias", "c": "head.bias"}
    arrays = {ours: state[theirs].numpy() for ours, theirs in names.items()}
    return arrays | {"k": state["a.weight"].numpy().T, "h": state["head.weight"].numpy().T}


@pytest.mark.control
def test_the_gradient_of_a_weight_of_two_names_is_compared():
    report = judged(tied(), Tied(), converter=of_tied)
    assert report.verdict == "equal" and not report.mapping.unplaced, str(report)
    assert judged(tied(jax.lax.stop_gradient), Tied()).verdict == "divergent"


@pytest.mark.control
def test_a_bound_that_only_jax_has_is_looked_for():
    clipped = judged(port(after=lambda x: jnp.clip(x, -20.0, 20.0)), Torch())
    assert clipped.verdict == "undecided" and "never reaches its bound of 20" in str(clipped)
    reached = judged(port(between=jax.nn.relu6), Torch(between=nn.functional.relu6))
    assert reached.verdict == "equal", str(reached)


def test_an_output_that_is_not_compared_is_named():
    with_aux = Torch(after=lambda net, hidden, logits: {"logits": logits, "hidden": hidden})
    report = judged(port(), with_aux)
    assert report.verdict == "equal" and "['hidden'] is not compared" in str(report)
    with_aux.aux = nn.Linear(16, 4)
    with_aux.after = lambda net, hidden, logits: {"logits": logits, "aux": net.aux(hidden)}
    report = judged(port(), with_aux)
    assert report.verdict == "undecided" and "nor is aux.weight" in str(report)


def test_a_frozen_body_stops_the_gradient_and_is_not_trained():
    """Fine-tuning of a head alone does so, with an optimizer that leaves the body out."""
    net = Torch()
    net.fc1.requires_grad_(False)
    body = {name: name in "ab" for name in "abcd"}
    ours = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), body))
    report = judged(
        port(between=lambda x: jax.lax.stop_gradient(jnp.tanh(x))), net,
        optax_optimizer=ours, torch_optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )  # fmt: skip
    assert report.verdict == "equal", str(report)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_frozen_layer_needs_no_gradient_in_jax(stopped):
    net = Torch()
    net.fc2.requires_grad_(False)
    apply, variables = port()

    def frozen(v, images, train):
        v = {n: jax.lax.stop_gradient(a) if n in "cd" and stopped else a for n, a in v.items()}
        return apply(v, images, train)[0], v

    report = judged((frozen, variables), net)
    assert report.verdict == "equal", str(report)
    assert ("PyTorch has frozen" in str(report)) != stopped


class Shifted(nn.Module):
    """A scale of no dimension, and a constant that no state_dict has."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3])[:, None, None], persistent=False)

    def forward(self, x):
        return (x - self.mean) * self.scale


def test_a_scalar_and_a_constant_beside_the_state_are_followed():
    (apply, variables), mean = port(), jnp.array([0.1, 0.2, 0.3])

    def shifted(v, images, train):
        return apply(v, (images - mean) * v["s"], train)[0], v

    report = judged((shifted, variables | {"s": jnp.array(1.0)}), Torch(before=Shifted()))
    assert report.verdict == "equal", str(report)


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_converter_may_round_to_a_narrow_type(kind):
    apply, variables = port()
    names = {"a": "fc1.weight", "b": "fc1.bias", "c": "fc2.weight", "d": "fc2.bias"}

    def convert(state):
        return {ours: jnp.asarray(state[theirs].numpy().T, kind) for ours, theirs in names.items()}

    narrow = {name: array.astype(kind) for name, array in variables.items()}
    report = judged((apply, narrow), Torch(), converter=convert)
    assert report.verdict == "equal", str(report)


def test_constants_of_bfloat16_are_what_their_author_wrote():
    def gelu(x):
        return jax.nn.gelu(x.astype(jnp.bfloat16)).astype(jnp.float32)

    net = Torch(between=nn.GELU("tanh"))
    assert judged(port(between=gelu), net).verdict == "equal"
    other = judged(port(between=lambda x: jax.nn.leaky_relu(x.astype(jnp.bfloat16), 0.1)),
                   Torch(between=nn.LeakyReLU(0.1)))  # fmt: skip
    assert other.verdict == "equal", str(other)


def test_a_parallel_map_is_refused_by_name():
    mesh = jax.make_mesh((1,), ("x",))
    spread = jax.shard_map(
        jnp.tanh, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
    )
    with pytest.raises(InputError, match="jax.shard_map or jax.pmap, which cannot be followed"):
        judged(port(between=spread), Torch())


def test_a_network_that_cannot_be_copied_is_told_so():
    net = Torch()
    net.held = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(InputError, match="the PyTorch network cannot be copied: RuntimeError"):
        judged(port(), net)


@pytest.mark.control
def test_a_difference_of_rounding_to_float32_is_told_so():
    net = Torch(between=lambda x: x * torch.sin(torch.arange(16) * 0.37))
    table = jnp.arange(16) * 0.37
    report = judged(port(between=lambda x: x * jnp.sin(table.astype(jnp.float64))), net)
    assert "as small as rounding to float32" in str(report)


@pytest.mark.parametrize(
    "cast", [lambda x: x.float(), lambda x: x.to(torch.float32), lambda x: x.half().float()]
)
def test_a_network_may_cast_its_images(cast):
    class Cast(nn.Module):
        def forward(self, x):
            return cast(x) * torch.ones(1, dtype=torch.float32)

    report = judged(port(), Torch(before=Cast()))
    assert report.verdict == "equal", str(report)


def test_a_forward_pass_that_raises_leaves_pytorch_as_it_is():
    def body(x):
        raise ValueError("no")

    with pytest.raises(InputError, match="ValueError: no"):
        judged(port(), Torch(between=body))
    assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float32


def test_a_buffer_that_nothing_uses_is_no_obstacle():
    net = Torch()
    net.register_buffer("unused", torch.ones(3))
    assert judged(port(), net).verdict == "equal"


def test_constants_of_bfloat16_are_lifted_alike():
    mean = torch.tensor([0.485, 0.1, 0.3], dtype=torch.bfloat16)[:, None, None]
    before = port(before=lambda x: x - jnp.asarray([0.485, 0.1, 0.3], jnp.bfloat16))

    class Mean(nn.Module):
        def forward(self, x):
            return x - mean

    assert judged(before, Torch(before=Mean())).verdict == "equal"
