"""What README says was measured, from the files that hold it."""

from collections.abc import Iterator

import numpy as np
import pytest

from equivalence_tests import mutants, results
from equivalence_tests.program.command import ROOT
from equivalence_tests.studies import criteria, reproduction
from flax_resnet.runs.tables import read_rows

README = (ROOT / "README.md").read_text()
RECIPES = ROOT / "results" / "recipes"


def quotes() -> Iterator[str]:
    yield from digits(results.read("digits-resnet18")["rows"])
    yield from localiser(results.read("localiser")["trials"])
    yield from false_alarms(results.read("false-alarms")["seeds"].values())
    yield from paired_trainings(results.read("tost"))
    yield from with_a_fault(results.read("tost-dampened-momentum"), seen=True)
    yield from with_a_fault(results.read("tost-BatchNorm-momentum-0.99"), seen=False)
    yield from growth_of_rounding(results.read("error-growth")["rows"])
    yield from start(results.read("startup-cpu")["seconds_to_first_step"])
    yield from spread([results.read(f"benchmark-cpu-{file}") for file in set(SPEEDS.values())])
    yield from from_files(results.read("benchmark-cpu-end-to-end")["rows"])
    yield from to_accuracy(results.read("benchmark-cpu-time-to-accuracy")["rows"])
    whole = [row for row in results.read("recipes")["rows"] if not row["subset"]]
    in_jax = {row["recipe"]: row for row in whole if row["framework"] == "jax"}
    yield from fine_tuning(in_jax)
    yield from own_settings(in_jax)
    yield from fewer_pixels_first(in_jax)
    yield from chosen_epochs(RECIPES / "imagenette-resnet18")
    yield from without_chance(results.read("same-imagenette-resnet18"))
    yield from lacking(reproduction.NOT_IN_THE_TWIN)


def localiser(trials) -> Iterator[str]:
    assert all(trial["causes"] for trial in trials)
    yield f"{sum(trial['right'] for trial in trials)} of {len(trials)} cases, and a cause in each"


def false_alarms(seeds) -> Iterator[str]:
    assert not any(row["failed"] for row in seeds)
    yield f"On {len(seeds)} other sets of inputs none"
    yield f"[{sum(row['tests'] for row in seeds):,} in all]"


def paired_trainings(measured) -> Iterator[str]:
    low, high = (100 * bound for bound in measured["interval_90"])
    yield f"{-100 * measured['mean_difference']:.2f} points below PyTorch's"
    yield f"90% interval {low:.3f} to {high:.3f}"
    yield f"p = {measured['p_value']:.1g}"


def with_a_fault(measured, *, seen) -> Iterator[str]:
    assert measured["mutant"] in mutants.MUTANTS
    assert measured["equivalent"] is not seen
    yield f"{100 * abs(measured['mean_difference']):.2f} points apart"
    if not seen:
        yield f"equivalent, p = {measured['p_value']:.1g}"


def growth_of_rounding(rows) -> Iterator[str]:
    least, most = rows[0], rows[-1]
    yield f"by {least['weights_difference']:.1e} at a learning rate of {least['lr']}"
    yield f"by {most['weights_difference']:.1e} at {most['lr']}"


def start(seconds) -> Iterator[str]:
    yield f"{seconds['cold']:.1f} s with an empty compilation cache"
    yield f"{seconds['second']:.1f} and {seconds['third']:.1f} s with a full one"


def spread(benchmarks) -> Iterator[str]:
    rows = [row for measured in benchmarks for row in measured["rows"]]
    shares = [row["images_per_second_iqr"] / row["images_per_second"] for row in rows]
    yield f"quartiles are {100 * min(shares):.0f} to {100 * max(shares):.0f}% of these medians"
    twin = [
        row["images_per_second"] / measured["torchvision"][row["mode"]]["images_per_second"]
        for measured in benchmarks
        for row in measured["rows"]
        if row["variant"] == "eager"
    ]
    yield f"network does, is at {min(twin):.2f} to {max(twin):.2f} of it"


def from_files(rows) -> Iterator[str]:
    synthetic = [row["images_per_second"] for row in rows if row["mode"] == "train"]
    yield f"gave {synthetic[0]:.0f} and {synthetic[1]:.0f}, a ratio of {np.divide(*synthetic):.2f}"
    jax, torch = (row["images_per_second"] for row in rows if row["mode"] == "end_to_end")
    yield f"takes {jax:.0f} images/s in JAX"
    yield f"and {torch:.0f} in PyTorch"
    yield f"same two cores, {jax / torch:.2f} times"


def to_accuracy(rows) -> Iterator[str]:
    (cold, warm), torch = (row["seconds_to_accuracy"] for row in rows)
    yield f"takes {cold:.1f} s with nothing compiled before and {warm:.1f} s with all of it"
    yield f"against {np.median(torch):.1f} s"


def fine_tuning(rows) -> Iterator[str]:
    reached = {
        name: f"{row['figures']['validation_accuracy']['mean']:.3f}" for name, row in rows.items()
    }
    yield f"{reached['transfer']} against {reached['transfer-scratch']} from scratch after 5 epochs"
    yield f"{reached['transfer-12-epochs']} against {reached['cifar10-resnet18-64px']} after 12"


def fewer_pixels_first(rows) -> Iterator[str]:
    accuracy = {
        name: f"{row['figures']['test_accuracy']['mean']:.4f}" for name, row in rows.items()
    }
    for net, first, both, straight, last in (
        ("cifar10-resnet18", "48px-start", "48-to-80px", "64px", " (and 3"),
        ("cifar10-resnet20", "24px-start", "24-to-32px", "short", " of one."),
    ):
        names = [f"{net}-{way}" for way in (first, both, straight)]
        minutes = [rows[name]["minutes"] for name in names]
        yield f"at {accuracy[names[1]]} after {sum(minutes[:2]):.0f} minutes"
        yield f"at {accuracy[names[2]]} after {minutes[2]:.0f}{last}"
    longest = [f"cifar10-resnet18-{way}" for way in ("48px-start", "48-to-64px", "64-to-80px")]
    epochs = sum(rows[name]["epochs"][0] for name in longest)
    minutes = sum(rows[name]["minutes"] for name in longest)
    yield f"{epochs} epochs in all, test at {accuracy[longest[-1]]} after {minutes:.0f} minutes"


def own_settings(rows) -> Iterator[str]:
    own, larger = (rows[f"cifar10-resnet18{pixels}"]["figures"] for pixels in ("", "-64px"))
    yield f"(training accuracy {own['train_accuracy']['mean']:.3f})"
    yield f"test at {own['test_accuracy']['mean']:.4f} on the JPEG copy"
    yield f"are worth {larger['test_accuracy']['mean']:.4f} after 12"
    first, enlarged = (
        read_rows(RECIPES / f"cifar10-resnet18{pixels}" / "seed0" / "metrics.csv")[0]
        for pixels in ("", "-64px")
    )
    yield f"former has {first['validation_accuracy']:.3f} of the validation images right"
    yield f"the latter {enlarged['validation_accuracy']:.3f}; the source has"


def chosen_epochs(folder) -> Iterator[str]:
    """Of a recipe without a schedule, over five seeds in both frameworks."""
    courses = {
        name: [read_rows(folder / f"seed{i}{name}" / "metrics.csv") for i in range(5)]
        for name in ("", "-torch")
    }

    def over_seeds(metric):
        """[framework, seed, epoch], over the epochs from the third on that all have."""
        return np.array(
            [[[r[metric] for r in run[2:7]] for run in runs] for runs in courses.values()]
        )

    losses = over_seeds("train_loss").mean(axis=1)
    yield f"within {np.abs(np.subtract(*losses)).max():.2f} of each other"
    means = {m: over_seeds(f"validation_{m}").mean(axis=(1, 2)) for m in ("loss", "accuracy")}
    yield f"mean validation loss {means['loss'][0]:.2f} and {means['loss'][1]:.2f}"
    yield f"accuracy {means['accuracy'][0]:.3f} and {means['accuracy'][1]:.3f}"
    best = [
        [1 + np.argmin([r["validation_loss"] for r in run]) for run in runs]
        for runs in courses.values()
    ]
    assert [sorted(set(epochs)) for epochs in best] == [[2, 3, 4, 5], [3, 4]]
    yield "one from the second to the fifth in JAX, the third or fourth in PyTorch"


def without_chance(measured) -> Iterator[str]:
    yield f"{measured['steps']} steps on 1,280 of its images end with"
    yield f"weights that differ by {measured['weights_difference']:.1e}"
    yield f"losses by {max(measured['loss_differences']):.1e} at most, and the same confusion"
    assert measured["confusion_matrix_equal"]


def lacking(fields) -> Iterator[str]:
    flags = [f"`--{name.replace('_', '-')}`" for name in sorted(fields)]
    yield f"It has no {', '.join(flags)};"


def digits(rows) -> Iterator[str]:
    seconds = sorted(row["wall_seconds"] for row in rows)
    accuracies = sorted(row["test_accuracy"] for row in rows)
    yield f"({seconds[0]:.0f} to {seconds[-1]:.0f} s with five seeds)"
    yield f"tests at {accuracies[0]:.3f} to {accuracies[-1]:.3f}"
    assert len(rows) == 5


def test_sentences_hold_the_figures():
    text = " ".join(README.split())
    assert [quote for quote in quotes() if quote not in text] == []


def test_the_table_of_mutants_counts_those_of_the_matrix():
    """Our tests first, then the criteria in their order."""
    rows = results.read("kill-matrix")["rows"]
    assert {row["mutant"] for row in rows} == mutants.MUTANTS.keys()
    killed = sum(bool(row["killed_by"]) for row in rows)
    seen = [sum(name in row["seen_by"] for row in rows) for name in criteria.CRITERIA]
    assert f"{killed} of {len(rows)} are killed" in README
    table = README[README.index("| criterion | mutants seen |") :].split("\n\n")[0]
    assert [int(line.split("|")[2]) for line in table.splitlines()[2:]] == [killed, *seen]


SPEEDS = {
    "training, ResNet-18, 7x7 stem": "resnet18-imagenet-stem-32",
    "inference, ResNet-18, 7x7 stem": "resnet18-imagenet-stem-32-inference",
    "training, ResNet-18, 3x3 stem": "resnet18-cifar-stem-32",
    "inference, ResNet-18, 3x3 stem": "resnet18-cifar-stem-32",
    "training, ResNet-50": "resnet50-224",
    "inference, ResNet-50": "resnet50-224",
}
PROGRAMS = ("jit", "eager", "eager-kept-memory", "compile", "compile-kept-memory")


@pytest.mark.parametrize("words, file", SPEEDS.items())
def test_the_table_of_speeds_is_the_benchmark(words, file):
    measured = results.read(f"benchmark-cpu-{file}")
    rows = [row for row in measured["rows"] if words.startswith(row["mode"])]
    speeds = {row["variant"]: row["images_per_second"] for row in rows}
    jit, *others = (speeds.get(name) for name in PROGRAMS)
    torchvision = measured["torchvision"][rows[0]["mode"]]["images_per_second"]
    others.insert(1, torchvision)
    [line] = [text for text in README.splitlines() if text.startswith(f"| {words}, ")]
    best = measured["ratios"][rows[0]["mode"]]["best_to_best"]
    expected = (jit, *others, jit / speeds["eager"], jit / torchvision, best)
    for quoted, value in zip(line.split("|")[2:-1], expected, strict=True):
        number = quoted.strip().replace(",", "")
        if value is None:
            assert number == "not run"
        else:
            assert float(number) == round(value, len(number.partition(".")[2]))


def test_the_table_of_remedies_is_what_was_measured():
    text = (ROOT / "results" / "README.md").read_text()
    table = text[text.index("| way | what is other |") :].split("\n\n")[0].splitlines()[2:]
    quoted = {line.split("|")[1].strip(" `"): line.split("|")[3:-1] for line in table}
    stems = [
        results.read(f"remedies-cpu-resnet18-{s}-stem-32")["rows"] for s in ("imagenet", "cifar")
    ]
    assert quoted.keys() == stems[0].keys() == stems[1].keys()
    for way, cells in quoted.items():
        rows = [rows[way] for rows in stems]
        expected = [(f"{r['milliseconds']:,.0f}", f"{r['times_as_long']:.2f}") for r in rows]
        assert [cell.strip() for cell in cells] == [cell for pair in expected for cell in pair], way
