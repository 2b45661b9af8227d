"""Checks that both frameworks compute the same, before timing and from the timed programs."""

from dataclasses import replace

import numpy as np

from equivalence_tests.benchmark import fresh_process
from equivalence_tests.benchmark.timing import CHECKED_IMAGES, PLAIN, VARIANTS, Job, Kept
from equivalence_tests.parity.tolerances import BUDGET_FACTOR, BUDGET_ULPS, relative_error

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float64": 2.0**-52}

SAME_LOSS = {"float32": 1e-3, "bfloat16": 5e-2, "float64": 1e-9}
"""Largest relative difference of first losses (or logits) between a timed program and the first
one. They differ by rounding, amplified over three steps. Measured with ResNet-18, the difference is
1.4e-2 without Nesterov's rule, 2.0e-2 without momentum, 3.4e-2 with twice the learning rate and
1.4e-7 without weight decay. So float32 shows all but the last, bfloat16 none of them and float64
all of them; `compare_losses` checks in float64."""


class Disagreement(Exception):
    """The two sides do not compute the same, so they are not timed."""


def compare_logits(settings, files, missing, kept: Kept, say) -> dict | None:
    """Compares the logits of both sides on a few images with float64.

    The error of JAX may be twice that of PyTorch, plus 4 units in the last place because PyTorch
    may happen to be exact.

    Returns:
      Both errors and the bound; None if only one side is available.

    Raises:
      Disagreement: the error of JAX is larger, or a program failed.
    """
    if set(settings.variants) - set(missing) != set(VARIANTS):
        return None
    jobs = plain_pair(settings.job, files, mode="logits", batch_size=CHECKED_IMAGES)
    jobs["truth"] = replace(jobs["torch"], dtype="float64", device="cpu")
    say("comparing logits")
    logits = {}
    for name, each in jobs.items():
        outcome = fresh_process.launch(each, kept)
        if "values" not in outcome:
            if "GPU" in outcome.get("skipped", ""):
                return None
            raise Disagreement(f"the logits of {each.framework}: {outcome}")
        logits[name] = np.array(outcome["values"])
    errors = {name: relative_error(logits[name], logits["truth"]) for name in VARIANTS}
    bound = BUDGET_FACTOR * errors["torch"] + BUDGET_ULPS * EPSILON[settings.job.dtype]
    if not errors["jax"] <= bound:
        raise Disagreement(
            f"logits disagree: JAX is {errors['jax']:.1e} from float64, PyTorch"
            f" {errors['torch']:.1e}; nothing was timed"
        )
    return {"jax_error": errors["jax"], "torch_error": errors["torch"], "bound": bound}


def compare_losses(settings, files, kept: Kept, say) -> dict:
    """Compares a few training steps of both sides in float64, which shows every part of the rule.

    Raises:
      Disagreement: the losses differ by more than rounding.
    """
    short = dict(batch_size=CHECKED_IMAGES, dtype="float64", device="cpu", warmup=1, blocks=0)
    jobs = plain_pair(settings.job, files, mode="train", **short)
    say("comparing losses")
    outcomes = {name: fresh_process.launch(job, kept) for name, job in jobs.items()}
    for name, outcome in outcomes.items():
        if "values" not in outcome:
            raise Disagreement(f"the losses of {name}: {outcome}")
    jax, torch = (np.array(outcomes[name]["values"]) for name in VARIANTS)
    if not (distance := relative_error(jax, torch)) <= SAME_LOSS["float64"]:
        raise Disagreement(
            f"losses disagree: in float64 JAX is {distance:.1e} from PyTorch; nothing was timed"
        )
    return {"losses_difference_float64": distance}


def plain_pair(job: Job, files, **changes) -> dict[str, Job]:
    """{framework: the job of its plain variant}."""
    return {
        name: replace(job, framework=name, variant=PLAIN[name], weights=str(files[name]), **changes)
        for name in VARIANTS
    }


def check_losses(outcomes):
    """The outcomes, with programs skipped whose losses differ from the first of their mode.

    Raises:
      Disagreement: the two plain variants differ.
    """
    first, checked = {}, []
    for runs in outcomes:
        found = [why for job, outcome in runs if (why := deviation(job, outcome, first))]
        checked.append([(runs[-1][0], {"skipped": found[0]})] if found else runs)
    return checked


def deviation(job: Job, outcome: dict, first: dict) -> str | None:
    """A sentence if the values differ too much from the first program's of that mode and batch.

    Args:
      first: {(mode, batch size): (job, values)}; a missing entry is added.
    """
    if "values" not in outcome:
        return None
    other, expected = first.setdefault((job.mode, job.batch_size), (job, outcome["values"]))
    distance = relative_error(np.array(outcome["values"]), np.array(expected))
    if distance <= SAME_LOSS[job.dtype]:
        return None
    why = f"its values are {distance:.1e} from those of {other.framework} {other.variant}"
    if {(j.framework, j.variant) for j in (job, other)} == set(PLAIN.items()):
        raise Disagreement(f"{job.mode}: {job.framework} {job.variant}: {why}")
    return why
