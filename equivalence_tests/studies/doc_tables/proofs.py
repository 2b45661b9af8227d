"""Tables of what the tests, the studies and the judge of ports have found."""

from equivalence_tests import results
from equivalence_tests.studies import criteria
from equivalence_tests.studies.markdown import table


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
            [
                "the same faults, found by the best of six criteria of other projects",
                f"{best} of {len(rows)}",
            ],
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
                f"the training of the first command below, {len(digits)} seeds, two CPU cores",
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


def ports() -> str:
    """Public JAX networks and what makes them other networks than PyTorch's."""
    rows = [
        [row["network"], row["verdict"], _listed_causes(row), _explained(row)]
        for row in results.read("ports")["rows"]
    ]
    return table(["network", "verdict", "causes (layers)", "these explain every difference"], rows)


def injected_ports() -> str:
    """Faults that the judge of ports found in small networks of other frameworks."""
    measured = results.read("port-faults")
    lines = []
    for framework in dict.fromkeys(key.split()[0] for key in measured["rows"]):
        own = [row for key, row in measured["rows"].items() if key.split()[0] == framework]
        sound = [v for key, v in measured["alarms"].items() if key.split()[0] == framework]
        alarms = f"{sum(v != 'equal' for v in sound)} of {len(sound)}"
        lines.append([framework, len(own), sum(row["right"] for row in own), alarms])
    header = ["framework", "faults put into a layer", "layer and cause named", "false alarms"]
    return table(header, lines, numbers=3)


def maxvit() -> str:
    """Why a published MaxViT in JAX computes other logits than torchvision's."""
    row = next(row for row in results.read("ports")["rows"] if row["name"] == "maxvit")
    rows = [[cause, f"`{names[0]}`", len(names)] for cause, names in row["causes"].items()]
    return table(["cause", "first layer", "layers"], rows, numbers=1)


def _explained(row: dict) -> str:
    """The word that says if the causes explain every difference; a dash without a difference."""
    return "-" if row["verdict"] == "equal" else "yes" if row["explained"] else "no"


def _listed_causes(row: dict) -> str:
    causes = [f"{cause} ({len(layers)})" for cause, layers in row["causes"].items()]
    return "; ".join(causes) or "none"


def survival() -> str:
    """Outcomes of killed runs and damaged files."""
    faults, flips = results.read("faults"), results.read("flips")
    weights, growth = results.read("weight-flips"), results.read("growth")
    configs = results.read("edges")
    kills, stops, pth = faults["SIGKILL"], faults["SIGTERM"], weights[".pth"]
    cost, million = faults["checkpoint_cost"], growth["sizes"][-1]
    left = faults["workers"]
    return table(
        ["what was done", "outcome"],
        [
            [
                "[`kill -9` at a random moment or at the start of a save, then `--resume`]"
                "(../results/faults.json)",
                f"the same bits in {kills['same_bits_after_resume']} of {kills['struck']}"
                f" ({kills['in_a_save']} of the kills came within a save)",
            ],
            [
                "[SIGTERM at a random moment, then `--resume`](../results/faults.json)",
                f"the same bits in {stops['same_bits_after_resume']} of {stops['struck']}",
            ],
            [
                "[`kill -9` of a run with two decoding processes](../results/faults.json)",
                f"{left['killed']} runs: {left['processes_left']} processes and"
                f" {left['segments_left']} segments of shared memory left after 10 s",
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
