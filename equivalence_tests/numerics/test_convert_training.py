"""A training continued in the other framework ends as one that stayed in its own."""

import jax
import numpy as np
import pytest

from equivalence_tests.parity import inputs, jax_side, tolerances, torch_side
from flax_resnet.config import OptimizerConfig, ScheduleConfig, TrainConfig
from flax_resnet.errors import InputError
from flax_resnet.interop import training_state
from flax_resnet.training import steps
from flax_resnet.training.network import Network
from torch_ref import optim
from torch_ref import training_state as torch_state

STEPS, CROSSING = 6, 3
SLOW = ("adam", "rmsprop", "adam, two batches an update")
RULES = {
    # Two parameter groups: torch numbers their parameters in another order than the model.
    "sgd": dict(momentum=0.9, nesterov=True, weight_decay=0.1, decay_norm_and_bias=False),
    "adam": dict(optimizer="adam"),
    "adamw": dict(optimizer="adamw", weight_decay=0.1),
    "rmsprop": dict(optimizer="rmsprop", momentum=0.9, centered=True),
    "adam, two batches an update": dict(optimizer="adam", accumulate_steps=2),
}


def make_case(rule: dict) -> inputs.Case:
    # A training can move to the other framework only between two updates.
    steps = STEPS * rule.get("accumulate_steps", 1)
    rule = dict(lr=1e-3, ema_decay=0.9, label_smoothing=0.1) | rule
    return inputs.make_case("basic_cnn", size=(8, 15), steps=steps, **rule)


def crossing(case: inputs.Case) -> int:
    return CROSSING * case.rule.get("accumulate_steps", 1)


class Torch:
    """A training in PyTorch."""

    def __init__(self, case: inputs.Case):
        self.case, self.step = case, 0
        self.accumulate = case.rule.get("accumulate_steps", 1)
        self.model = torch_side.make_model(case).train()
        self.optimizer = optim.make_optimizer(self.model, case.optimizer)
        self.ema = optim.make_ema(self.model, case.rule["ema_decay"])

    def train(self, until: int) -> "Torch":
        for step in range(self.step, until):
            torch_side.one_step(self.model, self.optimizer, self.case, step, {"loss": {}})
            if (step + 1) % self.accumulate == 0:
                self.ema.update_parameters(self.model)
        self.step = until
        return self

    @property
    def arrays(self) -> dict:
        state = self.model, self.optimizer, self.ema
        return torch_state.training_arrays(*state, self.step)

    def load(self, arrays: dict) -> "Torch":
        state = self.model, self.optimizer, self.ema
        self.step = torch_state.load_training_arrays(arrays, *state, self.accumulate)
        return self


class Jax:
    """A training in JAX, equal to `Torch`."""

    def __init__(self, case: inputs.Case):
        self.case = case
        constant = ScheduleConfig(schedule="constant")
        self.config = TrainConfig(optimizer=OptimizerConfig(**case.rule), schedule=constant)
        self.network = Network(jax_side.make_model(case))
        self.state = steps.make_state(self.network.initial, self.config)
        self.train_step = jax.jit(
            steps.make_train_step(
                self.network,
                self.config,
                inputs.AsGiven(),
                num_classes=case.num_classes,
                steps_per_epoch=STEPS,
            )
        )

    def train(self, until: int) -> "Jax":
        for step in range(int(self.state.step), until):
            batch = jax_side.batch_of(self.case, step)
            batch = {name: batch[name] for name in ("image", "label", "index")}
            self.state, _ = self.train_step(self.state, batch)
        return self

    @property
    def arrays(self) -> dict:
        return training_state.training_arrays(self.state, self.config.optimizer)

    def load(self, arrays: dict) -> "Jax":
        rule = self.config.optimizer
        self.state = training_state.load_training_arrays(self.state, arrays, rule)
        return self


def differences(got: dict, expected: dict) -> list[str]:
    """Names of arrays that differ by more than the bound."""
    assert got["step"] == expected["step"]
    found = []
    for part in ("model", "optimizer", "ema"):
        assert got[part].keys() == expected[part].keys()
        for name, array in expected[part].items():
            distance = np.linalg.norm(got[part][name] - array)
            if not distance <= tolerances.TRAJECTORY * np.linalg.norm(array):
                found.append(f"{part}: {name}")
    return found


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=pytest.mark.slow if r in SLOW else []) for r in RULES]
)
def test_the_other_framework_goes_on(rule, x64):
    """State is loaded into a training at another step, so every part has to be replaced."""
    case = make_case(RULES[rule])
    ours, theirs = Jax(case).train(crossing(case)), Torch(case).train(crossing(case))
    from_jax, from_torch = ours.arrays, theirs.arrays
    end = len(case.images)
    expected = theirs.train(end).arrays
    assert expected["optimizer"] and expected["ema"]
    assert differences(ours.train(end).arrays, expected) == []
    assert differences(ours.load(from_torch).train(end).arrays, expected) == []
    assert differences(theirs.load(from_jax).train(end).arrays, expected) == []
    # A part that is not loaded changes the result.
    for part in ("model", "optimizer", "ema"):
        stale = from_torch | {part: expected[part]}
        assert differences(ours.load(stale).train(end).arrays, expected) != []


def test_batch_norm_statistics_are_converted_too(x64):
    case = inputs.make_case("resnet20", steps=2, lr=1e-3, ema_decay=0.9, label_smoothing=0.1)
    ours, theirs = Jax(case), Torch(case)
    from_jax, from_torch = ours.arrays, theirs.train(1).arrays
    assert differences(ours.load(from_torch).arrays, from_torch) == []
    assert theirs.load(from_jax).step == 0
    assert differences(theirs.arrays, from_jax) == []


def test_the_state_before_the_first_update_is_converted(x64):
    case = make_case(RULES["adam"])
    ours, theirs = Jax(case), Torch(case)
    assert theirs.arrays["optimizer"] == {}
    ours.load(Torch(case).train(1).arrays)
    fresh = ours.load(theirs.arrays).arrays
    assert fresh["step"] == 0 and not any(a.any() for a in fresh["optimizer"].values())


def broken(arrays: dict) -> dict:
    optimizer = dict(arrays["optimizer"])
    del optimizer["fc.bias exp_avg"]
    optimizer["fc9.bias exp_avg"] = np.zeros(3)
    optimizer["fc.weight exp_avg_sq"] = optimizer["fc.weight exp_avg_sq"].T
    ema = arrays["ema"] | {"fc.bias": arrays["ema"]["fc.bias"][:-1]}
    return arrays | {"optimizer": optimizer, "ema": ema}


@pytest.mark.parametrize("framework", [Jax, Torch])
def test_all_faults_in_one_error_and_nothing_changed(framework, x64):
    case = make_case(RULES["adam"])
    before = Torch(case).train(1).arrays
    training = framework(case).load(before)
    with pytest.raises(ValueError) as error:
        training.load(broken(before))
    message = str(error.value)
    assert "\n" not in message
    for words in ("fc.bias exp_avg", "fc9.bias exp_avg", "fc.weight exp_avg_sq", "ema: fc.bias"):
        assert words in message
    assert differences(training.arrays, before) == []


def test_numbers_that_are_not_finite_are_refused(x64):
    training = Jax(make_case(RULES["adam"]))
    arrays = training.arrays
    arrays["optimizer"]["fc.bias exp_avg"][0] = np.nan
    with pytest.raises(InputError, match="fc.bias exp_avg has non-finite values"):
        training.load(arrays)


def test_no_state_is_converted_between_two_updates(x64):
    training = Jax(make_case(RULES[SLOW[-1]]))
    training.state = training.state._replace(step=training.state.step + 1)
    with pytest.raises(InputError, match="between two updates"):
        assert training.arrays


def test_files_of_torchs_trainings(tmp_path, x64):
    case = make_case(RULES["adamw"])
    there, here = Torch(case).train(2), Torch(case)
    state = there.model, there.optimizer, there.ema
    torch_state.save(tmp_path / "a.pt", *state, 2)
    step = torch_state.load(tmp_path / "a.pt", here.model, here.optimizer, here.ema)
    here.step = step
    assert step == 2 and differences(here.arrays, there.arrays) == []
    with pytest.raises(ValueError, match="model, optimizer and step"):
        torch_state.load(tmp_path / "a.pt", here.model, here.optimizer)
