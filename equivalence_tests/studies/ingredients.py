"""Lists for each ingredient of the recipes its definition, the test of its equality, its faults.

    python -m equivalence_tests.studies.ingredients  # seconds; after the kill matrix

Writes results/ingredients.json and .md.
"""

import sys

from equivalence_tests import results
from equivalence_tests.studies.markdown import table

POLICIES, AUGMENT, IMAGES = "test_policies.py", "test_augment.py", "test_images.py"
OPTIM, SCHEDULES, LAYERS = "test_optim.py", "test_schedules.py", "test_layers.py"
LOSSES = "test_losses_metrics.py"

INGREDIENTS = {
    "random resized crop, `--scale`, `--ratio`": (
        "torchvision RandomResizedCrop",
        f"{IMAGES}::test_random_resized_crop_draws_areas_and_ratios_as_torchvision",
        ["random areas of a quarter"],
    ),
    "`--interpolation`": (
        "Pillow's resize",
        f"{IMAGES}::test_other_filters_are_pillows",
        ["resized bicubically", "resized to the nearest"],
    ),
    "`--vertical-flip`": (
        "torchvision RandomVerticalFlip",
        f"{AUGMENT}::test_vertical_flip_bit_exact",
        ["vertical flip to the side"],
    ),
    "`--mixup`": ("torchvision MixUp", f"{AUGMENT}::test_mixup_exact", [
        "mixed with the reversed batch",
    ]),
    "`--cutmix`": ("torchvision CutMix", f"{AUGMENT}::test_cutmix_bit_exact", [
        "CutMix by the area drawn", "CutMix across",
    ]),
    "`--random-erasing`": ("torchvision RandomErasing", f"{AUGMENT}::test_erasing_exact", [
        "erased before normalising",
    ]),
    "`--auto-augment` ta_wide, ra, imagenet, cifar10": (
        "torchvision TrivialAugmentWide, RandAugment, AutoAugment on Pillow's images",
        f"{POLICIES}::test_policies_are_torchvisions_with_its_draws",
        ["sheared around the centre", "equalized by shares"],
    ),
    "`--auto-augment` rand-m7-mstd0.5-inc1": (
        "timm rand_augment_transform",
        f"{POLICIES}::test_policies_are_timms_with_its_draws",
        ["sheared around the centre"],
    ),
    "`--repeated-augmentation`": (
        "torchvision's references: RASampler",
        "test_sampling.py::test_repeated_augmentation_has_the_order_of_rasampler",
        ["copies share their draws"],
    ),
    "`--sampler` balanced": (
        "torch WeightedRandomSampler",
        "test_sampling.py::test_balanced_draws_have_equal_classes",
        ["balanced draws ignore the classes"],
    ),
    "`--class-weights`": ("torch CrossEntropyLoss(weight=)", (
        f"{LOSSES}::test_class_weights_are_torchs"
    ), ["weighted loss over the images"]),
    "`--loss` bce, `--bce-threshold`": (
        "timm BinaryCrossEntropy",
        f"{LOSSES}::test_binary_cross_entropy_is_timms",
        ["binary losses summed", "no threshold of targets"],
    ),
    "`--label-smoothing`": (
        "torch CrossEntropyLoss(label_smoothing=)",
        f"{LOSSES}::test_cross_entropy_and_label_smoothing",
        ["smoothing over the other classes"],
    ),
    "`--stochastic-depth`": (
        "torchvision StochasticDepth, with timm's chances",
        f"{LAYERS}::test_stochastic_depth_is_torchvisions_in_every_block",
        ["branches not rescaled", "stochastic depth alike in all blocks"],
    ),
    "`--optimizer` lamb": (
        "timm Lamb",
        f"{OPTIM}::test_every_update_and_state_is_torchs",
        ["LAMB adapts spared parameters", "LAMB clips with 1e-6"],
    ),
    "`--head-lr`": (
        "torch's parameter groups",
        f"{OPTIM}::test_every_update_and_state_is_torchs",
        ["head at the backbone's rate"],
    ),
    "`--norm-weight-decay`": (
        "torchvision's references: set_weight_decay",
        f"{OPTIM}::test_every_update_and_state_is_torchs",
        ["decay of norms for biases too"],
    ),
    "`--ema-steps`, `--ema-after-warmup`": (
        "torchvision's references: model_ema_steps",
        f"{OPTIM}::test_every_update_and_state_is_torchs",
        ["average of every update"],
    ),
    "`--schedule-per` epoch": (
        "torch's schedulers, stepped after an epoch",
        f"{SCHEDULES}::test_schedules_by_epochs",
        ["rate of every update"],
    ),
    "`--warmup-within`": (
        "timm CosineLRScheduler",
        f"{SCHEDULES}::test_a_warmup_within_the_cosine_is_timms",
        ["warm-up before the cosine"],
    ),
}  # fmt: skip
"""{ingredient: (definition, test in numerics/, mutants)}"""


def rows() -> list[dict]:
    """A row for each ingredient; `killed` has the first test that fails on each of its faults, or
    None where none does or the kill matrix lacks the fault."""
    killers = {row["mutant"]: row["killed_by"] for row in results.read("kill-matrix")["rows"]}
    return [
        {
            "ingredient": name,
            "defined_by": definition,
            "equal_by": f"equivalence_tests/numerics/{test}",
            "killed": {mutant: killers.get(mutant) for mutant in mutants},
        }
        for name, (definition, test, mutants) in INGREDIENTS.items()
    ]


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    header = ["ingredient", "defined by", "test of equality", "mutants that tests find"]
    cells = [
        [
            row["ingredient"],
            row["defined_by"],
            f"`{row['equal_by'].rpartition('/')[2]}`",
            ", ".join(m if by else f"{m} (**not yet**)" for m, by in row["killed"].items()),
        ]
        for row in rows
    ]
    return table(header, cells)


def page(rows: list[dict]) -> str:
    """The table, with what its columns mean."""
    return f"# Ingredients of the recipes\n\n{INTRODUCTION}\n\n{markdown(rows)}"


INTRODUCTION = """\
An ingredient is a part of a published training recipe: an augmentation, a loss, an optimizer or a
schedule, with its flag of `flax-resnet train`. Each row names the library that defines the
ingredient and the test that compares the two. The tests are in `equivalence_tests/numerics`. A
mutant is a fault injected into the JAX code; the [kill matrix](kill-matrix.md) says what each one
does and which test fails on it."""


def main() -> int:
    found = rows()
    results.write("ingredients", {"rows": found})
    (results.FOLDER / "ingredients.md").write_text(page(found))
    return int(not all(all(row["killed"].values()) for row in found))


if __name__ == "__main__":
    sys.exit(main())
