"""The localiser names module, phase and cause of a fault, and nothing for equal traces.

`python -m equivalence_tests.studies.localiser_check` is the long version over all layers. A mutant
is a known difference between ports and PyTorch, injected as a fault.
"""

import functools

import numpy as np
import pytest

from equivalence_tests import mutants, results
from equivalence_tests.parity import engine, jax_side, localise
from equivalence_tests.studies import localiser_check

pytestmark = pytest.mark.control

ARCH = "resnet20"
OF_A_LAYER = [
    m.name
    for m in mutants.MUTANTS.values()
    if m.layer and m.phase and m.difference not in ("8a", "11b")  # those need bottlenecks
]


def some_layer(mutant) -> str:
    model = jax_side.make_model(localiser_check.case_of(ARCH), np.float32)
    names = list(mutants.eligible_layers(mutant, model))
    return names[len(names) // 2]


@pytest.mark.parametrize("name", OF_A_LAYER)
def test_a_fault_in_one_layer(name):
    mutant = mutants.MUTANTS[name]
    layer = some_layer(mutant)
    edit = functools.partial(localiser_check._put, mutant, layer)
    trial = localiser_check.localised(mutant, ARCH, layer, edit=edit)
    assert trial.right, trial
    assert len(trial.causes) == 1, trial


@pytest.mark.parametrize(
    "epsilon, cause", [(1.001e-5, "eps is 1.001e-05 instead of 1e-05"), (0.0, "eps is 0 instead")]
)
def test_an_eps_near_the_right_one_and_none(epsilon, cause):
    case = localiser_check.case_of(ARCH)
    got = engine.run_jax(case, edit=lambda model: setattr(model.layer2[1].bn1, "epsilon", epsilon))
    finding = localise.first_divergence(got, localiser_check.reference(ARCH), case)
    assert (finding.phase, finding.module) == ("forward", "layer2.1.bn1")
    assert len(finding.causes) == 1 and cause in finding.causes[0]


def test_another_decay_and_the_biased_variance_are_told_apart():
    names = "BatchNorm momentum 0.99", "biased running variance"
    case = localiser_check.case_of(ARCH)

    def edit(model):
        for name in names:
            localiser_check._put(mutants.MUTANTS[name], "layer2.1.bn1", model)

    got = engine.run_jax(case, edit=edit)
    finding = localise.first_divergence(got, localiser_check.reference(ARCH), case)
    (cause,) = finding.causes
    assert "momentum is 0.01 instead of 0.1" in cause and "(n - 1) / n with n = 84" in cause


CAUSES = {
    "smoothing over the other classes": "e / (K - 1)",
    "no Nesterov": "plain instead of Nesterov's",
    "norm and bias spared": "weight decay is not in the gradient",
    "dampened momentum": "times 1 - momentum",
    "Adam's eps in the root": "under Adam's root",
    "Adam's correction in float32": "rounded to float32",
    "AdamW decays without the rate": "not multiplied by the learning rate",
    "RMSprop's eps in the root": "under RMSprop's root",
    "RMSprop's rate before momentum": "rate goes into RMSprop's momentum",
    "RMSprop's decay 0.9": "alpha is 0.9 instead of 0.99",
    "clipping without 1e-6": "max / norm",
}


def test_faults_without_a_layer():
    trials = {trial.mutant: trial for trial in localiser_check.rule_trials("basic_cnn")}
    assert [t for t in trials.values() if not t.right] == []
    for name, words in CAUSES.items():
        assert len(trials[name].causes) == 1 and words in trials[name].causes[0], trials[name]


def test_a_gradient_at_zero():
    trials = list(localiser_check.relu_trials(ARCH, 2))
    assert len(trials) == 1 and trials[0].right and "ReLU" in trials[0].causes[0], trials


def test_equal_traces_have_no_first_divergence():
    case = localiser_check.case_of(ARCH)
    got = engine.run_jax(case)
    assert localise.first_divergence(got, localiser_check.reference(ARCH), case) is None


def test_an_unknown_fault_has_no_cause():
    case = localiser_check.case_of(ARCH)
    got = engine.run_jax(case)
    wrong = np.array(got["forward"]["layer2.0.conv1"])
    wrong[0, 0] += 0.1
    got["forward"]["layer2.0.conv1"] = wrong
    finding = localise.first_divergence(got, localiser_check.reference(ARCH), case)
    assert (finding.phase, finding.module) == ("forward", "layer2.0.conv1")
    assert finding.causes == []


def test_the_long_run_keeps_the_rows_of_other_networks(tmp_path, monkeypatch, capsys):
    """`--archs` replaces the rows of these networks; one wrong answer in two fails the command."""
    right, wrong = (
        localiser_check.Trial("resnet18", "m", "conv1", "forward", phase, phase and "conv1", ("c",))
        for phase in ("forward", None)
    )
    old = [
        row | {"right": True} for row in (right._asdict(), right._replace(arch="other")._asdict())
    ]
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.write("localiser", {"trials": old})
    monkeypatch.setattr(localiser_check, "trials", lambda arch: [wrong])
    monkeypatch.setattr("sys.argv", ["localiser_check", "--archs", "resnet18"])
    assert localiser_check.main() == 1
    document = results.read("localiser")
    assert [(row["arch"], row["right"]) for row in document["trials"]] == [
        ("other", True), ("resnet18", False)
    ]  # fmt: skip
    assert document["summary"] == {
        "trials": 2, "right": 1, "right_share": 0.5, "with_a_cause": 2
    }  # fmt: skip
    assert "WRONG" in capsys.readouterr().out
