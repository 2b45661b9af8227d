"""Compare a JAX network with a PyTorch network, tensor by tensor, in float64 on the CPU.

python scripts/parity.py --jax-model my.nets:make --torch-model my.torch_nets:make   # your port
python scripts/parity.py --arch resnet18                           # our two, with random weights
python scripts/parity.py --checkpoint mine.pth --report out/        # our two, with your weights
python scripts/parity.py --torch-model my_package.nets:make_resnet  # ours in JAX, yours in PyTorch
python scripts/parity.py --checkpoint RUN_DIR --dataset folder:DIR  # and their predictions

Exit status: 0 equal, 1 divergent, 2 bad input, or inputs that would hide a fault.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich import box
from rich.table import Table

from flax_resnet import list_models
from flax_resnet.commands import cli, exits, output_files
from flax_resnet.config import DataConfig, Shortcut, Stem, check_shortcut, check_stem
from flax_resnet.data.sources import places
from flax_resnet.errors import BAD_INPUT, InputError, extra_needed
from flax_resnet.files import replacing
from flax_resnet.runs import environment
from flax_resnet.runs.display import Display
from flax_resnet.runs.views import class_names, read_config
from flax_resnet.text import say
from flax_resnet.training import restore
from flax_resnet.weights import convert

try:
    from equivalence_tests.parity import engine, localise, own_model, predictions, report
    from equivalence_tests.parity.causes.evidence import module_of
    from equivalence_tests.parity.inputs import (
        case_of_weights,
        make_case,
        random_numbers,
        random_state,
    )
    from equivalence_tests.parity.ports import command as ports
except ModuleNotFoundError as error:
    exits.leave(BAD_INPUT, f"error: {extra_needed('a comparison', error.name, 'torch')}")

VERDICTS = ("equal", "rounding", "semantic")
COLUMNS = {
    "forward": "forward",
    "gradient": "backward",
    "batch_norm": "norm",
    "optimizer": "optim",
    "parameters": "params",
}
NEEDED = (
    ("stem", "arch"), ("shortcut", "arch"), ("mean", "dataset"), ("std", "dataset"),
    ("weights_key", "checkpoint"), ("ema", "checkpoint"),
    ("jax_model", "torch_model"), ("converter", "jax_model"), ("mapping", "jax_model"),
    ("own_weights", "jax_model"), ("optax_optimizer", "torch_optimizer"),
    ("torch_optimizer", "optax_optimizer"), ("optax_optimizer", "jax_model"),
)  # fmt: skip
MODES = {"evaluation": False, "training": True}


def parse():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--arch", metavar="NAME", help="our network (default: found from weights)")
    stems, shortcuts = ("|".join(get_args(kind)) for kind in (Stem, Shortcut))
    parser.add_argument("--stem", metavar=stems, help="first layers of --arch")
    parser.add_argument("--shortcut", metavar=shortcuts, help="shortcuts of --arch")
    parser.add_argument(
        "--checkpoint", metavar="WEIGHTS", help="weights: file, run directory, name"
    )
    parser.add_argument("--weights-key", metavar="KEY", help=cli.WEIGHTS_KEY)
    parser.add_argument("--ema", action="store_true", help=cli.EMA)
    parser.add_argument(
        "--torch-model", metavar="MODULE:CALLABLE", help="your own network in PyTorch"
    )
    parser.add_argument(
        "--jax-model", metavar="MODULE:CALLABLE", help="your own network in JAX: NNX, Linen,"
        " Equinox, Haiku, Keras, transformers, or (apply, variables)",
    )  # fmt: skip
    ports.add_flags(parser)
    parser.add_argument(
        "--image-size", type=int, nargs="+", metavar="INT", help="height [width], pixels"
    )
    parser.add_argument(
        "--dataset", metavar="NAME[:PATH]", help="also compare predictions on its test images"
    )
    parser.add_argument(
        "--mean", type=float, nargs="+", metavar="FLOAT", help="channel means of --dataset"
    )
    parser.add_argument(
        "--std",
        type=float,
        nargs="+",
        metavar="FLOAT",
        help="channel standard deviations of --dataset; both for pixels from 0 to 1",
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write parity.json and .html in DIR"
    )
    args = parser.parse_args()
    if args.checkpoint and args.torch_model:
        raise InputError("--checkpoint and --torch-model exclude each other")
    for flag, needed in NEEDED:
        if getattr(args, flag) and not getattr(args, needed):
            flag, needed = (word.replace("_", "-") for word in (flag, needed))
            raise InputError(f"--{flag}: only with --{needed}")
    if not (args.arch or args.checkpoint or args.torch_model):
        raise InputError("give --arch, --checkpoint or --torch-model")
    if args.jax_model and (other := args.arch and "arch" or args.dataset and "dataset"):
        raise InputError(f"--jax-model and --{other} exclude each other")
    if args.image_size and (len(args.image_size) > 2 or min(args.image_size) < 1):
        raise InputError("--image-size: a height and a width of 1 or more, or one for both")
    check_report(args)
    if args.arch:
        cli.check_choice("--arch", args.arch, list_models())
        check_stem(args.arch, args.stem)
        check_shortcut(args.arch, args.shortcut)
    return args


def check_report(args):
    """Raises InputError where the report would replace what the comparison reads or writes."""
    output_files.check_folder("--report", args.report)
    if args.report and args.report.is_dir():
        data = places(args.dataset) if args.dataset else ()
        for name in ("parity.json", "parity.html", "parity.png"):
            outputs = {"--mapping": args.mapping, "--report": args.report / name}
            output_files.check_outputs(outputs, [args.checkpoint] if args.checkpoint else (), data)


def build_case(args, model):
    """The case that both sides run on."""
    size = tuple(args.image_size * 2)[:2] if args.image_size else None
    try:
        if args.checkpoint or model:
            return own_case(args, model, size)
        kind = {"stem": args.stem, "shortcut": args.shortcut}
        return make_case(args.arch, **kind, size=size, batch=4)
    except InputError:
        raise
    except ValueError as error:
        word = "--image-size" if size else args.checkpoint
        raise InputError(f"{word}: {error}") from None


def own_case(args, model, size):
    """A case of the user's weights, or of random weights in the user's network."""
    if model:
        arrays = own_model.weights(model)
    else:
        arrays = restore.load_weights(args.checkpoint, args.weights_key, ema=args.ema, say=say)
    try:
        arch = args.arch or convert.nearest_architecture(arrays).arch
        kind = convert.describe(arrays, arch, args.stem, args.shortcut)
        arrays = convert.conform(arrays, kind.shapes())
    except InputError as error:
        if not model or args.arch:
            raise
        reason = f"--torch-model {args.torch_model} is none of this project's networks"
        raise InputError(f"{reason}; give its JAX port as --jax-model ({error})") from None
    if model:  # freshly initialised weights hide differences that random ones show
        arrays = random_state(kind.shapes(), random_numbers(1))
        own_model.fill(model, arrays)
    return case_of_weights(arrays, kind.arch, kind.stem, kind.shortcut, size=size)


def compare(case, model) -> tuple[dict, dict | None]:
    """Rows of both modes, and the first divergence or None."""
    rows, first = {}, None
    for mode, train in MODES.items():
        ours = engine.run_jax(case, train=train, jit=True)
        if model:  # the user's network is the side that may be wrong
            subject, standard = own_model.trace(model, case, train=train), ours
            standard = engine.shared(standard, subject)
            subject = engine.shared(subject, standard)
        else:
            subject, standard = ours, engine.run_torch(case, train=train)
        rows[mode] = [
            row._asdict() | {"verdict": localise.verdict(row, case.arch)}
            for row in engine.compare(subject, standard)
        ]
        finding = first is None and localise.first_divergence(subject, standard, case)
        if finding:
            first = {**finding.row._asdict(), "mode": mode}
            first |= {"module": finding.module, "causes": finding.causes}
    return rows, first


def layers_of(first: dict | None) -> dict:
    """The first layer that differs, in the terms of a report on two networks of the user's own."""
    layers = [] if first is None else [
        {
            "torch_name": first["module"] or first["name"],
            "jax_name": first["module"] or first["name"],
            "phase": first["phase"],
            "mode": first["mode"],
            "relative": first["norm_relative"],
            "causes": first["causes"],
        }
    ]  # fmt: skip
    return {
        "first": layers[0] if layers else None,
        "divergent_layers": layers,
        "unmatched": {"jax": [], "torch": []},
    }


def data_config(args) -> DataConfig:
    """The data set for predictions; its preprocessing is that of the run, if there is one."""
    options = {k: v for k in ("mean", "std") if (v := getattr(args, k))}
    options = {name: tuple(values) for name, values in options.items()}
    base = DataConfig()
    if args.checkpoint and Path(args.checkpoint).is_dir():
        base = read_config(args.checkpoint).data
    return replace(base, dataset=args.dataset, train_images=None, eval_images=None, **options)


def predicted(args, case, data: DataConfig) -> dict:
    """Agreement of predictions; a user's network is loaded anew, with its own weights."""
    own = own_model.load(args.torch_model) if args.torch_model else None
    names = class_names(args.checkpoint) if args.checkpoint else ()
    if own:
        shapes = {name: array.shape for name, array in case.arrays.items()}
        case = replace(case, arrays=convert.conform(own_model.weights(own), shapes))
    return predictions.agreement(case, data, own, names)


def layer_table(rows: dict) -> Table:
    """One line per layer: the largest relative difference in each phase of a training step."""
    title = "one step of training: largest relative differences"
    table = Table(title=title, box=box.SIMPLE, padding=0)  # within 80 columns
    table.add_column("layer", overflow="fold")
    for name in (*COLUMNS.values(), "ulp"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for layer, part in by_layer(rows["training"]).items():
        cells = [_largest(r["max_relative"] for r in part if r["phase"] == p) for p in COLUMNS]
        worst = max((r["verdict"] for r in part), key=VERDICTS.index)
        table.add_row(layer, *cells, f"{max(r['ulp'] for r in part):.2g}", worst)
    return table


def by_layer(rows: list[dict]) -> dict[str, list[dict]]:
    """{module: its rows}, in the order of the forward pass."""
    layers = {}
    for row in rows:
        if row["phase"] in COLUMNS:
            name = module_of(engine.Row(**{k: row[k] for k in engine.Row._fields}))
            layers.setdefault(name or row["name"], []).append(row)
    return layers


def _largest(values) -> str:
    values = list(values)
    return f"{max(values):.0e}" if values else ""


def main():
    args = parse()
    if args.jax_model:
        return finish(args, ports.compared(args))
    data = data_config(args) if args.dataset else None
    model = own_model.load(args.torch_model) if args.torch_model else None
    case = build_case(args, model)
    rows, first = compare(case, model)
    document = {
        "subject": args.torch_model or f"flax_resnet's {case.arch}",
        "standard": f"flax_resnet's {case.arch}" if model else "its PyTorch twin",
        "what": f"{case.arch}, {args.checkpoint or args.torch_model or 'random weights'}, images"
        f" {'x'.join(map(str, case.images.shape[1:]))}, float64",
        "verdict": "equal" if first is None else "divergent",
        "first_divergence": first,
        **layers_of(first),
        "largest": max(r["norm_relative"] for part in rows.values() for r in part),
        "rows": rows,
    }
    if data:
        document["predictions"] = found = predicted(args, case, data)
        if not found["relative_difference"] <= predictions.ROUNDING:  # also if it is NaN
            document["verdict"] = "divergent"
    document |= {"command": exits.command_line(), "environment": environment.describe(1)}
    return finish(args, document)


def finish(args, document: dict):
    """Shows a comparison, writes its report and ends with its status."""
    show(document)
    if args.report:
        write(args.report, document)
    if document["verdict"] == "divergent":
        raise exits.CheckFailed(sentence(document))
    if document["verdict"] == "undecided":
        raise InputError(sentence(document))


def show(document: dict):
    display = Display()
    for line in document.get("lines", ()):
        display.say(line)
    if "sentence" not in document:
        display.show(layer_table(document["rows"]))
    if found := document.get("predictions"):
        display.say(
            f"{found['agree']:,} of {found['images']:,} predictions agree;"
            f" {predictions.accuracies(found)}"
        )
    if document["verdict"] == "equal":
        display.say(sentence(document))


def sentence(document: dict) -> str:
    if "sentence" in document:
        return document["sentence"]
    first = document["first_divergence"]
    if first is None and document["verdict"] == "divergent":
        return f"divergent: {predictions.explanation(document['predictions'])}"
    if first is None:
        return f"equal: every tensor agrees to rounding, {document['largest']:.1e} at most"
    causes = " or ".join(first["causes"]) or "unknown"
    return (
        f"divergent, first in {first['phase']} of {first['module'] or first['name']}"
        f" ({first['mode']} mode, relative difference {first['norm_relative']:.1e});"
        f" likely cause: {causes}"
    )


def finite(value):
    """Replaces infinite and NaN numbers by words, because JSON has none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(folder: Path, document: dict):
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(document), indent=1, allow_nan=False)
    with replacing(folder / "parity.json") as place:
        place.write_text(text + "\n")
    with replacing(folder / "parity.html") as place:
        place.write_text(report.page(document))
    with replacing(folder / "parity.png") as place:
        report.picture(place, document["rows"]["training"])
    say(folder / "parity.html")
