"""The tables of figures in README.md and docs/, generated from the files in results/.

    python -m equivalence_tests.studies.doc_tables    # updates all pages

A page holds a table between `<!-- begin table: NAME -->` and `<!-- end table -->`.
"""

import re
from pathlib import Path

import numpy as np

from equivalence_tests import results
from equivalence_tests.studies import criteria, reproduction_page
from flax_resnet.recipes import RECIPES

ROOT = results.FOLDER.parent
MARKED = re.compile(r"(<!-- begin table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def pages() -> list[Path]:
    """Paths of README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text of a page with the tables between its markers generated anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def table(header: list[str], rows: list[list], *, numbers: int = 0) -> str:
    """A Markdown table; the last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [header, rule, *rows])


def headline() -> str:
    """The first table of README.md."""
    rows = results.read("kill-matrix")["rows"]
    killed = sum(bool(row["killed_by"]) for row in rows)
    best = max(sum(name in row["seen_by"] for row in rows) for name in criteria.CRITERIA)
    alarms = results.read("false-alarms")["seeds"].values()
    failed, tests = sum(len(s["failed"]) for s in alarms), sum(s["tests"] for s in alarms)
    growth = results.read("error-growth")["rows"]
    digits = results.read("digits-resnet18")["rows"]
    accuracy, seconds = (_range(digits, key) for key in ("test_accuracy", "wall_seconds"))
    return table(
        ["measured", "result"],
        [
            [
                "known differences between PyTorch and JAX, injected one by one as faults:"
                " found by our tests",
                f"[{killed} of {len(rows)}](results/kill-matrix.md)",
            ],
            ["the same, found by the best of six criteria of other projects", f"{best}"],
            [
                f"false alarms of the same tests on {len(alarms)} other sets of inputs",
                f"[{failed} of {tests:,}](results/false-alarms.json)",
            ],
            [
                "relative difference of the weights after 120 steps of ResNet-20 in both"
                " frameworks, float64",
                f"[{growth[0]['weights_difference']:.1e} to"
                f" {growth[-1]['weights_difference']:.1e}](results/error-growth.json)",
            ],
            [
                f"the first command below, {len(digits)} seeds, two CPU cores",
                f"[test accuracy {accuracy[0]:.3f} to {accuracy[1]:.3f} in {seconds[0]:.0f} to"
                f" {seconds[1]:.0f} s](results/digits-resnet18.json)",
            ],
        ],
    )


def _range(rows: list[dict], key: str) -> tuple[float, float]:
    values = [row[key] for row in rows]
    return min(values), max(values)


CRITERIA = {
    "fresh weights 1e-5": "evaluation logits of fresh weights within 1e-5 (transformers)",
    "trained logits 1e-5": "evaluation logits of trained weights, rtol 1e-5 (bonsai, Flax)",
    "all-ones image 1e-4": "logits of an image of ones within 1e-4 (jax-resnet)",
    "mean difference 1e-5": "mean difference of the logits below 1e-5 (flaxmodels)",
    "training mode 1e-4, 1e-6": "training logits within 1e-4, statistics within 1e-6 (torch2jax)",
    "training loss rtol 1": "training loss, rtol 1 (AlgoPerf)",
}
"""Each of `criteria.CRITERIA` in words, with the project that uses it."""


def faults_found() -> str:
    """Number of mutants (injected faults) that our tests and other projects' criteria detect."""
    rows = results.read("kill-matrix")["rows"]
    killed = sum(bool(row["killed_by"]) for row in rows)
    lines = [["our tests", f"{killed} of {len(rows)}"]]
    for name, words in CRITERIA.items():
        seen = sum(name in row["seen_by"] for row in rows)
        lines.append([words, f"{seen} of {len(rows)}"])
    return table(["criterion", "faults found"], lines, numbers=1)


def localiser() -> str:
    """Number of faults that the localiser found."""
    trials = results.read("localiser")["trials"]
    archs = dict.fromkeys(trial["arch"] for trial in trials)
    lines = []
    for arch in archs:
        own = [trial for trial in trials if trial["arch"] == arch]
        right = sum(trial["right"] for trial in own)
        caused = sum(bool(trial["causes"]) for trial in own)
        lines.append([arch, len(own), right, caused])
    return table(
        ["network", "faults put into a layer", "layer and phase right", "a cause named"],
        lines,
        numbers=3,
    )


def paired_trainings() -> str:
    """Two one-sided t-tests over paired trainings, sound and with faults."""
    lines = []
    for name in ("tost", "tost-dampened-momentum", "tost-BatchNorm-momentum-0.99"):
        measured = results.read(name)
        low, high = (100 * bound for bound in measured["interval_90"])
        lines.append(
            [
                f"[{measured.get('mutant') or 'none'}](../results/{name}.json)",
                f"{100 * measured['mean_difference']:+.2f}",
                f"{low:+.2f} to {high:+.2f}",
                "yes" if measured["equivalent"] else "no",
                f"{measured['p_value']:.1g}",
            ]
        )
    header = ["fault put into JAX", "difference, points", "90% interval", "equivalent", "p"]
    return table(header, lines, numbers=4)


def error_growth() -> str:
    """Growth of rounding errors during a training, by learning rate."""
    lines = [
        [row["lr"], f"{row['weights_difference']:.1e}", f"{max(row['loss_differences']):.1e}"]
        for row in results.read("error-growth")["rows"]
    ]
    header = ["learning rate", "weights, relative difference", "losses, largest difference"]
    return table(header, lines, numbers=3)


SPEEDS = {
    "training, ResNet-18, 7x7 stem, 32 px": "resnet18-imagenet-stem-32",
    "inference, ResNet-18, 7x7 stem, 32 px": "resnet18-imagenet-stem-32-inference",
    "training, ResNet-18, 3x3 stem, 32 px": "resnet18-cifar-stem-32",
    "inference, ResNet-18, 3x3 stem, 32 px": "resnet18-cifar-stem-32",
    "training, ResNet-50, 224 px, batch 16": "resnet50-224",
    "inference, ResNet-50, 224 px, batch 16": "resnet50-224",
}
PROGRAMS = ("jit", "eager", "eager-kept-memory", "compile", "compile-kept-memory")


def speeds() -> str:
    """Images a second of both frameworks, and their ratios."""
    lines = []
    for words, file in SPEEDS.items():
        measured = results.read(f"benchmark-cpu-{file}")
        mode = words.partition(",")[0].replace("training", "train")
        rows = {r["variant"]: r["images_per_second"] for r in measured["rows"] if r["mode"] == mode}
        shown = [_speed(rows.get(name)) for name in PROGRAMS]
        shown.insert(2, _speed(measured["torchvision"][mode]["images_per_second"]))
        ratios = [rows["jit"] / rows["eager"], measured["ratios"][mode]["best_to_best"]]
        name = f"[{words}](../results/benchmark-cpu-{file}.json)"
        lines.append([name, *shown, *(f"{ratio:.2f}" for ratio in ratios)])
    header = [
        "network", "JAX", "PyTorch eager", "torchvision's net, eager", "eager, memory kept",
        "torch.compile", "compile, memory kept", "JAX / eager", "JAX / best of PyTorch",
    ]  # fmt: skip
    return table(header, lines, numbers=8)


def _speed(value: float | None) -> str:
    if value is None:
        return "not run"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def gpu_speeds() -> str:
    """Training steps of both frameworks on one GPU."""
    lines = []
    for row in results.read("benchmark-h200")["rows"]:
        seconds = np.median(row["seconds_per_step"])
        speed, memory = row["batch_size"] / seconds, row["peak_memory_bytes"] / 1e9
        first = f"{row['first_step_seconds']:.0f}"
        lines.append(
            [row["network"], row["program"], f"{1e3 * seconds:.2f}", f"{speed:,.0f}", first,
             f"{memory:.2f}"]
        )  # fmt: skip
    header = ["network, bfloat16", "program", "ms a step", "images/s", "first step, s", "GB"]
    return table(header, lines, numbers=4)


def gpu_bounds() -> str:
    """Programs on one GPU beside what `plan` said of them."""
    lines = []
    for name, row in results.read("measured-h200")["programs"].items():
        planned = row["planned"]
        lines.append(
            [
                f"`{name}`, batch {row['batch_size']:,}",
                f"{row['images_per_second']:,.0f}",
                f"{row['batch_size'] / row['bound_seconds']:,.0f}",
                f"{row['measured_over_bound']:.2f}",
                f"{planned['bytes'] / 1e9:.2f}, {row['bytes'] / 1e9:.2f}",
                f"{planned['peak_bytes'] / 1e9:.2f}, {row['peak_bytes'] / 1e9:.2f}",
            ]
        )
    header = [
        "training step", "images/s", "bound", "times the bound's time",
        "GB moved: planned, on the card", "GB of memory: planned, on the card",
    ]  # fmt: skip
    return table(header, lines, numbers=5)


def gpu_ways() -> str:
    """Parts of the step in other ways, on one GPU."""
    rows = results.read("remedies-h200-resnet50")["rows"]
    lines = [
        [f"`{way}`", f"{row['milliseconds']:.1f}", f"{row['times_as_long']:.3f}"]
        for way, row in rows.items()
    ]
    return table(["way", "ms a step", "times as long"], lines, numbers=2)


def whole_trainings() -> str:
    """Speed from image files, seconds to an accuracy and seconds to the first step."""
    from_files = results.read("benchmark-cpu-end-to-end")["rows"]
    ours, theirs = (r["images_per_second"] for r in from_files if r["mode"] == "end_to_end")
    rows = results.read("benchmark-cpu-time-to-accuracy")["rows"]
    (cold, warm), torch = (row["seconds_to_accuracy"] for row in rows)
    start = results.read("startup-cpu")["seconds_to_first_step"]
    file = "../results/benchmark-cpu"
    return table(
        ["measured", "JAX", "PyTorch"],
        [
            [
                f"[images/s, CIFAR-10 from JPEG files, with validation]({file}-end-to-end.json)",
                f"{ours:.0f}",
                f"{theirs:.0f}",
            ],
            [
                "[seconds to 95% on the digits: nothing compiled before; all"
                f" compiled]({file}-time-to-accuracy.json)",
                f"{cold:.1f}; {warm:.1f}",
                f"{np.median(torch):.1f}",
            ],
            [
                "[seconds from the command to the first step: empty compilation cache; full"
                " one](../results/startup-cpu.json)",
                f"{start['cold']:.1f}; {start['second']:.1f}",
                "not run",
            ],
        ],
        numbers=2,
    )


def recipes() -> str:
    """Published figures and ours, on whole data sets."""
    rows = [row for row in results.read("recipes")["rows"] if not row["subset"]]
    return reproduction_page.markdown(rows)


def regularization() -> str:
    """The accuracies of regularised networks and of plain ones."""
    return _question(
        "resnet18-regularized", "resnet18-regularized-base", "resnet18-regularized-decay",
        "resnet18-224", "resnet18-224-plain", "resnet18-48px", "resnet18-48px-plain",
        "cifar10-resnet18-dropout", "imagenette-cnn", "imagenette-cnn-plain", "cifar10-resnet18",
        "cifar10-resnet18-64px",
    )  # fmt: skip


def transfer() -> str:
    """The accuracies of fine-tuned networks and of those from random weights."""
    return _question(
        "transfer-source", "transfer", "transfer-12-epochs", "transfer-scratch",
        "cifar10-resnet18-64px",
    )  # fmt: skip


def depth() -> str:
    """The accuracies of networks of different depth."""
    he = (f"cifar10-resnet{layers}" for layers in (20, 32, 44, 56, 110))
    return _question(
        "imagenette-cnn", "imagenette-cnn-plain", "imagenette-resnet18", "cifar10-resnet50-224",
        "cifar10-resnet50-64px", "cifar10-resnet101-224", *he,
    )  # fmt: skip


def _question(*recipes: str) -> str:
    """The runs of some recipes in JAX on whole data sets."""
    rows = [row for row in results.read("recipes")["rows"] if not row["subset"]]
    ours = {row["recipe"]: row for row in rows if row["framework"] == "jax"}
    header = ["recipe", "method", "seeds", "epochs", "training", "test", "gap", "loss"]
    return table(header, [_reached(ours[name]) for name in recipes if name in ours], numbers=4)


def _reached(row: dict) -> list[str]:
    figures, epochs = row["figures"], sorted({min(row["epochs"]), max(row["epochs"])})
    train, test, loss = (figures[f] for f in ("train_accuracy", "test_accuracy", "test_loss"))
    return [
        f"`{row['recipe']}`",
        RECIPES[row["recipe"]].method,
        ", ".join(map(str, row["seeds"])),
        "-".join(map(str, epochs)),
        *(reproduction_page.reached(each) for each in (train, test)),
        f"{100 * (train['mean'] - test['mean']):.1f}",
        f"{loss['mean']:.2f}",
    ]


def recipe_pairs() -> str:
    """Recipes that ran in both frameworks."""
    return reproduction_page.pairs_markdown(results.read("recipes")["rows"])


def survival() -> str:
    """Outcomes of killed runs and damaged files."""
    faults, flips = results.read("faults"), results.read("flips")
    weights, growth = results.read("weight-flips"), results.read("growth")
    configs = results.read("edges")
    kills, stops, pth = faults["SIGKILL"], faults["SIGTERM"], weights[".pth"]
    cost, million = faults["checkpoint_cost"], growth["sizes"][-1]
    return table(
        ["what was done", "outcome"],
        [
            [
                "[`kill -9` at a drawn moment, then `--resume`](../results/faults.json)",
                f"the same bits in {kills['same_bits_after_resume']} of {kills['struck']}"
                f" ({kills['in_a_save']} struck within a save)",
            ],
            [
                "[SIGTERM at a drawn moment, then `--resume`](../results/faults.json)",
                f"the same bits in {stops['same_bits_after_resume']} of {stops['struck']}",
            ],
            [
                "[one bit flipped in any file of a run directory](../results/flips.json)",
                f"{flips['flips']:,} flips: {flips['named']:,} named, {flips['harmless']:,}"
                f" harmless, {flips['silent']} silent, {flips['traceback']} tracebacks",
            ],
            [
                "[one bit flipped in a `.pth`](../results/weight-flips.json)",
                f"{weights['flips']:,} flips: {pth['refused']:,} refused,"
                f" {pth['same weights']} read as the same weights,"
                f" {pth['other weights']} as others",
            ],
            [
                "[random configs with fields at the edges of their ranges, traced]"
                "(../results/edges.json)",
                f"{configs['traced'] + configs['refused']:,} configs: {configs['traced']:,} traced,"
                f" {configs['refused']:,} refused, {len(configs['faults'])} other errors",
            ],
            [
                "[checkpoints of ResNet-18, one an epoch](../results/faults.json)",
                f"{cost['waited_seconds']:.2f} s of waiting in an epoch of"
                f" {cost['epoch_seconds']:.0f} s",
            ],
            [
                f"[a folder of {million['files']:,} images, up to the first"
                " step](../results/growth.json)",
                f"{million['cpu_seconds_to_first_step']:.0f} s of CPU time,"
                f" {million['peak_mib_at_first_step']:.0f} MiB",
            ],
        ],
    )


def scaling() -> str:
    """Memory and exchange of compiled steps on many devices."""
    whose = {"batch": "the whole batch", "device": "each device"}
    lines = []
    for row in results.read("scaling")["rows"]:
        reduced = row["collectives"]
        lines.append([
            row["target"],
            f"{row['devices']:,}",
            "-" if row["devices"] == 1 else whose[row["statistics"]],
            f"{(row['argument_bytes'] + row['temporary_bytes']) / 1e9:.1f}",
            sum(each["count"] for each in reduced),
            sum(each["in_forward"] for each in reduced),
            f"{sum(each['bytes'] for each in reduced) / 1e6:.1f}",
            f"{1e3 * row['bound_seconds_without_exchange']:.1f}",
            f"{1e3 * row['exchange_seconds']:.1f}",
        ])  # fmt: skip
    header = ["target", "devices", "statistics of", "GB", "all-reduces", "forward", "MB",
              "bound, ms", "exchange, ms"]  # fmt: skip
    return table(header, lines, numbers=6)


def plan() -> str:
    """One command of `flax-resnet plan`, its targets side by side."""
    rows = results.read("plan-resnet50")["targets"]
    lines = {
        "devices": [f"{row['devices']:,}" for row in rows],
        "peak of memory, GB": [
            f"{row['peak_bytes'] / 1e9:.1f} of {row['device_memory_bytes'] / 1e9:.1f}"
            for row in rows
        ],
        "largest batch that fits": [f"{row['largest_batch']:,}" for row in rows],
        "TFLOPs of products": [f"{row['flops_per_step'] / 1e12:.2f}" for row in rows],
        "bytes, GB": [f"{row['bytes_per_step'] / 1e9:.1f}" for row in rows],
        "bound, images/s": [f"{row['bound_images_per_second']:,.0f}" for row in rows],
        "all-reduces": [
            f"{sum(each['count'] for each in row['collectives']):,}" for row in rows
        ],
    }  # fmt: skip
    header = ["", *(f"`{row['target']}`" for row in rows)]
    return table(header, [[name, *cells] for name, cells in lines.items()], numbers=len(rows))


def step_bytes() -> str:
    """Bytes of compiled training steps on one H100, and the floor that their shapes allow."""
    rows = results.read("step-bytes")["rows"]
    cells = [
        [network, variant, f"{row['bytes'] / 1e9:.2f}", f"{row['floor'] / 1e9:.2f}",
         f"{row['bytes'] / row['floor']:.3f}"]
        for network, variants in rows.items()
        for variant, row in variants.items()
    ]  # fmt: skip
    return table(["network", "variant", "GB a step", "floor", "of the floor"], cells, numbers=3)


def gradient_sums() -> str:
    """Errors of gradients that devices have summed."""
    rows = results.read("gradient-sums")["rows"]
    lines = {}
    for row in rows:
        line = lines.setdefault(row["devices"], {"devices": f"{row['devices']:,}"})
        line[f"{row['dtype']}, {row['way']}"] = f"{row['median_error']:.1e}"
    header, *_ = map(list, lines.values())
    return table(header, [list(line.values()) for line in lines.values()], numbers=len(header))


def ports() -> str:
    """Public JAX networks and what makes them other networks than PyTorch's."""
    rows = [
        [row["network"], row["verdict"], _listed_causes(row), "yes" if row["explained"] else "no"]
        for row in results.read("ports")["rows"]
    ]
    return table(["network", "verdict", "causes (layers)", "these explain every difference"], rows)


def maxvit() -> str:
    """Why a published MaxViT in JAX computes other logits than torchvision's."""
    row = next(row for row in results.read("ports")["rows"] if row["name"] == "maxvit")
    rows = [[cause, f"`{names[0]}`", len(names)] for cause, names in row["causes"].items()]
    return table(["cause", "first layer", "layers"], rows, numbers=1)


def _listed_causes(row: dict) -> str:
    causes = [f"{cause} ({len(layers)})" for cause, layers in row["causes"].items()]
    return "; ".join(causes) or "none"


TABLES = {
    function.__name__: function
    for function in (
        headline, faults_found, localiser, paired_trainings, error_growth, speeds,
        gpu_speeds, gpu_bounds, gpu_ways, whole_trainings, recipes, recipe_pairs, regularization,
        transfer, depth, survival, scaling, gradient_sums, plan, step_bytes, ports,
        maxvit,
    )
}  # fmt: skip


if __name__ == "__main__":
    for path in pages():
        path.write_text(filled(path.read_text()))
