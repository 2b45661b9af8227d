"""Convert weights between PyTorch's files, safetensors and run directories, or export a program.

python scripts/convert.py resnet50.pth resnet50.safetensors
python scripts/convert.py runs/resnet20-birds birds.pth                 # the best weights
python scripts/convert.py runs/resnet20-birds birds.stablehlo           # with its preprocessing
python scripts/convert.py runs/resnet20-birds birds.onnx --fold-batchnorm
python scripts/convert.py runs/resnet20-birds birds.onnx --int8         # reads training images
python scripts/convert.py resnet20.th runs/pretrained --dataset folder:DIR
python scripts/convert.py resnet50.pth runs/imagenet --class-names NAMES.txt --image-size 224 \\
    --resize-size 256 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225
python scripts/convert.py runs/resnet20-birds birds.pt --training       # with the optimizer
python scripts/convert.py birds.pt runs/birds --training --config runs/resnet20-birds/config.json
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from flax_resnet.commands import cli, convert_int8, convert_torch, exits
from flax_resnet.config import TrainConfig, config_from_file, from_dict
from flax_resnet.data import pipeline
from flax_resnet.data.prepare import contents
from flax_resnet.errors import InputError
from flax_resnet.interop import export, training_state, weights_to_run
from flax_resnet.interop.loaded_run import LoadedRun, load_run
from flax_resnet.runs import environment
from flax_resnet.runs.directory import check_usable
from flax_resnet.runs.views import read_config
from flax_resnet.text import say
from flax_resnet.training import restore, steps
from flax_resnet.weights import convert, files, published
from flax_resnet.weights.convert import TORCH_SUFFIXES

PROGRAM_SUFFIXES = (".stablehlo", ".onnx")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, *PROGRAM_SUFFIXES)
CALIBRATION_IMAGES = 256
MODEL_FLAGS = ("arch", "stem", "shortcut")
DATA_FLAGS = (
    "dataset", "image_size", "resize_size", "interpolation", "grayscale", "exif_transpose", "mean",
    "std",
)  # fmt: skip


def parse():
    parser = cli.Parser(description=__doc__)
    about = "run directory, weights file, torchvision:ARCH, timm:NAME, hf:OWNER/REPO or URL"
    parser.add_argument("input", type=source, metavar="IN", help=about)
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help=f"a file with one of the suffixes {', '.join(SUFFIXES)}; a name without a suffix is a"
        " run directory",
    )
    parser.add_argument("--weights-key", metavar="KEY", help=cli.WEIGHTS_KEY)
    parser.add_argument("--ema", action="store_true", help=cli.EMA)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--fold-batchnorm", action="store_true", help=cli.FOLD_BATCHNORM)
    about = "write int8 weights and activations into an .onnx file; BatchNorm is folded"
    parser.add_argument("--int8", action="store_true", help=about)
    about = "data set whose training images calibrate the activations (default: the run's)"
    parser.add_argument("--calibrate", metavar="DATASET", help=about)
    about = f"number of images that calibrate (default: {CALIBRATION_IMAGES})"
    parser.add_argument("--calibration-images", metavar="INT", type=int, help=about)
    parser.add_argument(
        "--training",
        action="store_true",
        help="convert an unfinished training (run directory <-> .pt) with optimizer, average and"
        " step; best epoch and early stopping begin anew",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="settings of the new run directory, as a config.json"
    )
    parser.add_argument(
        "--class-names",
        metavar="FILE|A,B,...",
        help="classes of the new run directory, one a line, where --dataset is not at hand",
    )
    cli.add_config_flags(parser, MODEL_FLAGS + DATA_FLAGS)
    args = parser.parse_args()
    args.suffix = suffix_of(args.output)
    args.is_run = isinstance(args.input, Path) and args.input.is_dir()
    if _same(args.input, args.output):
        raise InputError(f"IN and OUT are the same, {args.input}; give another OUT")
    if args.is_run and Path(os.path.realpath(args.output)).is_relative_to(
        os.path.realpath(args.input)
    ):
        raise InputError(f"OUT: {args.output} lies in the run {args.input}, which stays as it is")
    check_output(args.output, args.suffix, args.overwrite)
    args.place = Path(os.path.realpath(args.output))  # a link stays, and leads to what is written
    check_flags(args)
    if args.training and (args.weights_key or args.ema):
        raise InputError("--weights-key and --ema choose weights; --training takes the whole file")
    check_int8(args)
    if args.fold_batchnorm and args.suffix not in PROGRAM_SUFFIXES:
        raise InputError(f"--fold-batchnorm: only for {' and '.join(PROGRAM_SUFFIXES)}")
    return args


def check_int8(args):
    """Raises InputError for flags of --int8 that do not fit."""
    if args.int8 and (args.suffix != ".onnx" or args.training):
        raise InputError("--int8: only for .onnx")
    for flag in ("calibrate", "calibration_images"):
        if getattr(args, flag) is not None and not args.int8:
            raise InputError(f"--{flag.replace('_', '-')} is for --int8")
    cli.check_positive("--calibration-images", args.calibration_images)
    if args.int8 and not (args.is_run or args.calibrate):
        raise InputError(f"--int8: {args.input} has no images of its own; give --calibrate DATASET")
    if args.int8 and not (args.is_run or args.class_names or args.config):
        args.dataset = args.dataset or args.calibrate  # whose classes are those of the weights


def source(text: str) -> str | Path:
    """The path of weights, or their name as it is."""
    return text if published.is_name(text) else Path(text)


def _same(one: str | Path, other: Path) -> bool:
    return os.path.exists(one) and other.exists() and other.samefile(one)


def suffix_of(path: Path) -> str:
    """The suffix of a path: the longest of `SUFFIXES` that it has in any case, else its own."""
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default=path.suffix)


def check_output(path: Path, suffix: str, overwrite: bool):
    """Raises InputError, before any work is done, unless the output can be written."""
    if suffix and suffix not in SUFFIXES:
        raise InputError(
            f"{path}: unknown suffix {suffix!r}; supported: {', '.join(SUFFIXES)}, or no suffix"
            " for a run directory"
        )
    if suffix not in ("", *PROGRAM_SUFFIXES) and (digest := files.digest_in_name(path.name)):
        raise InputError(f"{path}: the name promises the SHA-256 {digest}; give another name")
    if suffix and not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.absolute().parent} does not exist")
    if not path.exists():
        return
    if path.is_dir() and (suffix or not any(path.iterdir())):
        raise InputError(f"{path} is a directory and no run: it is not replaced")
    if not overwrite:
        raise InputError(f"{path} exists; replace it with --overwrite")
    if path.is_dir():
        check_usable(path, resume=False, overwrite=True)


def check_flags(args):
    """Raises InputError for flags whose values a file of weights cannot hold."""
    if not args.suffix or args.suffix in PROGRAM_SUFFIXES:
        return
    for name in ("config", "class_names", *DATA_FLAGS, *(MODEL_FLAGS if args.training else ())):
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: a {args.suffix} file does not hold it")


def requested_config(args, known: dict | None = None) -> TrainConfig:
    """The config of --config, else of the run, else with what is known of the data of the weights,
    changed by the flags."""
    if args.config:
        config = config_from_file(args.config)
    else:
        config = read_config(args.input) if args.is_run else from_dict({"data": known or {}})
    values = cli.requested_values(args)
    size = values.get("data", {}).get("image_size")
    if size and not args.config and str(size) != str(config.data.image_size):
        # The resize of the weights belongs to the size that is replaced.
        values["data"] = {"resize_size": size} | values["data"]
    return cli.merge(config, values)


def make_run(args, weights, arrays, architecture: convert.Architecture) -> LoadedRun:
    """A run of these arrays; classes and statistics come with the weights, or from the flags or the
    data."""
    config, channels = requested_config(args, weights.data), architecture.in_channels
    config, names = weights_to_run.with_model_of(config, architecture, arrays), ()
    data = {}  # facts about the training data
    described = args.dataset or args.class_names or args.config
    if weights.class_names and not described:
        names = weights.class_names
        if args.is_run:
            weights_to_run.check_channels(config, channels)
            data = load_run(args.input).contents
        else:
            config = weights_to_run.without_data(config, None, channels)
    elif args.class_names or (args.suffix and not described):
        config = weights_to_run.without_data(config, args.dataset, channels)
        if args.class_names:
            names = weights_to_run.class_names(args.class_names, config.model.num_classes)
            weights_to_run.check_order(names, weights.class_names)
    else:
        unknown = [n for n in ("image_size", "mean", "std") if getattr(config.data, n) is None]
        config, dataset = with_data(args, config, channels)
        if convert.has_head(arrays) and unknown:
            say(_taken_from_data(unknown, config))
        names, data = dataset.class_names, contents(dataset)
        arrays = arrays | restore.head_in_order(arrays, weights.class_names, names)
    environment.configure_jax(config)
    return replace(weights_to_run.as_run(arrays, config, names, channels), contents=data)


def _taken_from_data(unknown: list[str], config: TrainConfig) -> str:
    """The line about settings of which trained weights tell nothing."""
    names = ", ".join(f"`{name}`" for name in unknown)
    return cli.as_flags(
        f"{names}: those of {config.data.dataset}, because the weights do not tell theirs; give"
        " them if they were other ones"
    )


def with_data(args, config: TrainConfig, channels: int):
    """`weights_to_run.with_data`; its error about other classes names the command to fine-tune."""
    try:
        return weights_to_run.with_data(config, channels)
    except weights_to_run.OtherClasses as error:
        model = config.model
        flags = {"arch": model.arch, "stem": model.stem, "shortcut": model.shortcut}
        flags |= {"dataset": config.data.dataset}
        flags |= {"init-from": args.input, "weights-key": args.weights_key}
        words = [w for k, v in flags.items() if v is not None for w in (f"--{k}", str(v))]
        command = exits.other_command("train", [*words, *["--ema"] * args.ema])
        raise InputError(f"{error}; to train them with a new head: {command}") from None


def write_run(path: Path, run: LoadedRun, source: str, divided: dict):
    """Write the directory of a finished run with weights of `source`.

    Args:
      divided: as `restore.Weights` has it.
    """
    arrays = convert.state_dict(run.network.to_model(run.variables))
    report = {
        "splits": {},
        "converted_from": source,
        "weights_sha256": digest(arrays),
        "command": exits.command_line(),
        "environment": environment.describe(num_devices=1),
    }
    export.write_run(
        path,
        run.config,
        steps.make_state(run.variables, run.config),
        class_names=run.class_names,
        channels=run.channels,
        contents=run.contents,
        progress={},
        divided=divided,
        report=report,
    )


def digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of the arrays' names and bytes, in their order."""
    sha = hashlib.sha256()
    for name, array in arrays.items():
        sha.update(name.encode() + array.tobytes())
    return sha.hexdigest()


def convert_weights(args):
    out, suffix = args.place, args.suffix
    weights = restore.pretrained(args.input, args.weights_key, ema=args.ema, say=say)
    arrays = weights.arrays
    arch = args.arch or convert.nearest_architecture(arrays).arch
    architecture = convert.describe(arrays, arch, args.stem, args.shortcut)
    shapes = architecture.shapes()
    if not convert.has_head(arrays) and convert.has_body(arrays, shapes):
        if suffix:
            raise InputError(
                f"{args.input} has no head (fc); a run directory gets a new one, with --dataset or"
                " --class-names"
            )
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("fc.")}
    arrays = convert.conform(arrays, shapes)
    if suffix == ".safetensors":
        export.write_safetensors(out, arrays)
    elif suffix in TORCH_SUFFIXES:
        convert_torch.write_weights(out, arrays)
    elif suffix:
        write_program(args, make_run(args, weights, arrays, architecture))
    else:
        run = make_run(args, weights, arrays, architecture)
        write_run(out, run, getattr(args.input, "name", args.input), weights.divided)
        architecture = architecture._replace(num_classes=len(run.class_names))
    head = "" if "fc.bias" in arrays else ", its head new and untrained"
    say(f"{architecture}{head}: {args.output}")


def write_program(args, run: LoadedRun):
    if args.int8:
        count = args.calibration_images or CALIBRATION_IMAGES
        convert_int8.write(args.place, run, args.calibrate, count)
    elif args.suffix == ".onnx":
        convert_torch.write_onnx(args.place, run, fold_batchnorm=args.fold_batchnorm)
    else:
        served = run.without_batchnorm() if args.fold_batchnorm else run
        export.write_stablehlo(args.place, served, run)


def training_to_run(args) -> int:
    """Convert a training of PyTorch into a run to resume; returns the number of steps done.

    PyTorch's file does not hold the best epoch or the state of early stopping: the run looks for
    the best among the epochs that are left.
    """
    if not args.config or args.class_names:
        raise InputError("--training needs the --config FILE and the data of the run to continue")
    config, dataset = weights_to_run.with_data(requested_config(args), None)
    environment.configure_jax(config)
    arrays = convert_torch.read_training(args.input, config, dataset.channels)
    run = weights_to_run.as_run(arrays["model"], config, dataset.class_names, dataset.channels)
    state = steps.make_state(run.variables, config)
    state = training_state.load_training_arrays(state, arrays, config.optimizer)
    per_epoch = pipeline.steps_per_epoch(len(dataset.train), config.batch_size)
    epoch, step = divmod(arrays["step"], max(1, per_epoch))
    if epoch >= config.epochs:
        raise InputError(
            f"{args.input}: its {arrays['step']} steps are all {config.epochs} epochs of"
            f" {args.config}: nothing is left to train; give a config of more epochs, or convert"
            " the weights alone, without --training"
        )
    export.write_run(
        args.place,
        config,
        state,
        class_names=run.class_names,
        channels=run.channels,
        contents=contents(dataset),
        progress={"epoch": epoch, "step_in_epoch": step, "converted_steps": step},
    )
    return arrays["step"]


def convert_a_training(args):
    if args.is_run and args.suffix in TORCH_SUFFIXES:
        step = convert_torch.write_training(args.place, args.input)
    elif isinstance(args.input, Path) and not args.is_run and not args.suffix:
        step = training_to_run(args)
    else:
        raise InputError("--training goes from a run directory to .pt, or from .pt to a directory")
    say(f"training after {step} steps: {args.output}")


def main():
    args = parse()
    try:
        if args.training:
            convert_a_training(args)
        else:
            convert_weights(args)
    except export.DamagedExport as error:
        raise exits.CheckFailed(str(error)) from None
