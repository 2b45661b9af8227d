"""Tables of times: both frameworks, on CPUs and on one GPU."""

from statistics import median

import numpy as np

from equivalence_tests import results
from equivalence_tests.studies.markdown import table

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
        best = max(rows[name] for name in PROGRAMS if name != "jit" and name in rows)
        ratios = [rows["jit"] / rows["eager"], rows["jit"] / best]
        name = f"[{words}](../results/benchmark-cpu-{file}.json)"
        lines.append([name, *shown, *(f"{ratio:.2f}" for ratio in ratios)])
    header = [
        "network", "JAX", "eager", "torchvision's net", "eager, kept",
        "compile", "compile, kept", "JAX / eager", "JAX / best",
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
        "training step", "images/s", "bound, on the card", "times the bound's time",
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


def decoding() -> str:
    """Images per second and core of each way to read JPEGs."""
    names = {
        "pillow": "Pillow alone, one thread",
        "torchvision_io": "`torchvision.io` alone, one thread",
        "timm_loader": "timm's loader",
        "worker_processes": "this project, `--num-workers`, image files",
        "worker_processes_and_shards": "this project, `--num-workers`, ArrayRecord shards",
        "threads": "this project, threads",
    }
    ways = results.read("decoding")["ways"]
    rows = [
        [names[way], str(row["cores"]), f"{row['images_per_second_a_core']:.0f}",
         f"{min(row['all']):.0f} to {max(row['all']):.0f}"]
        for way, row in ways.items()
    ]  # fmt: skip
    return table(["way", "cores", "images/s a core, median", "of 3 rounds"], rows, numbers=3)


def members() -> str:
    """A training of several members beside as many single trainings."""
    measured = results.read("members")
    lines = [
        [
            words,
            *(
                f"{median(each[way][figure] for each in measured['rounds']):,.0f}"
                for figure in ("images_per_second", "wall", "peak_mib")
            ),
        ]
        for way, words in (
            ("members", f"`--members {measured['members']}`"),
            ("alone", f"{measured['members']} trainings in turn"),
        )
    ]
    return table(["training", "images/s of the steps", "seconds in all", "MiB"], lines, numbers=3)


def serving() -> str:
    """The table of the programs that serve a network: their predictions and their speed."""
    lines = []
    for name, row in results.read("serving")["programs"].items():
        one, two = (row["cores"][cores] for cores in ("1", "2"))
        lines.append([
            name,
            f"{row['file_bytes'] / 1e6:.1f}" if row["file_bytes"] else "-",
            f"{row['accuracy']:.4f}",
            f"{row['equal_predictions']:.2%}",
            f"{two['first_answer_s']:.2f}",
            *(f"{cores['milliseconds']:.1f}" for cores in (one, two)),
            *(f"{cores['images_per_second']:,.0f}" for cores in (one, two)),
        ])  # fmt: skip
    header = [
        "program", "file, MB", "accuracy", "predictions as JAX's in float32", "first answer, s",
        "ms an image, 1 core", "2 cores", "images/s in batches, 1 core", "2 cores",
    ]  # fmt: skip
    return table(header, lines, numbers=8)
