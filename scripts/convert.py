"""Convert weights between PyTorch's files, safetensors and run directories, and write programs for
serving.

python scripts/convert.py resnet50.pth resnet50.safetensors
python scripts/convert.py runs/resnet20-birds birds.pth                 # the best weights
python scripts/convert.py runs/resnet20-birds birds.stablehlo           # with its preprocessing
python scripts/convert.py runs/resnet20-birds birds.onnx --fold-batchnorm
python scripts/convert.py resnet20.th runs/pretrained --dataset folder:DIR
python scripts/convert.py resnet50.pth runs/imagenet --class-names NAMES.txt --image-size 224 \\
    --resize-size 256 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225
python scripts/convert.py runs/resnet20-birds birds.pt --training       # optimizer and all
python scripts/convert.py birds.pt runs/birds --training --config runs/resnet20-birds/config.json
"""

import hashlib
from pathlib import Path

import _convert_torch
import numpy as np

from flax_resnet import adopt, cli, convert, convert_training, environment, export, serve, steps
from flax_resnet.config import InputError, TrainConfig
from flax_resnet.convert import TORCH_SUFFIXES
from flax_resnet.data import pipeline
from flax_resnet.run_directory import config_from_file
from flax_resnet.serve import LoadedRun

PROGRAM_SUFFIXES = (".stablehlo", ".onnx")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, *PROGRAM_SUFFIXES)
MODEL_FLAGS = ("arch", "stem")
DATA_FLAGS = ("dataset", "image_size", "resize_size", "grayscale", "exif_transpose", "mean", "std")


def parse():
    parser = cli.Parser(prog="convert.py", description=__doc__)
    parser.add_argument("input", type=Path, metavar="IN", help="run directory or weights file")
    parser.add_argument("output", type=Path, metavar="OUT", help=", ".join(SUFFIXES) + ", or none")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--fold-batchnorm", action="store_true", help=cli.FOLD_BATCHNORM)
    parser.add_argument(
        "--training",
        action="store_true",
        help="a training in its middle: run directory <-> .pt with optimizer, average and step;"
        " best epoch and early stopping begin anew",
    )
    parser.add_argument("--config", metavar="FILE", help="run directory: start from this config")
    parser.add_argument(
        "--class-names",
        metavar="FILE|A,B,...",
        help="run directory: the classes, one a line, where --dataset is not at hand",
    )
    cli.add_config_flags(parser, MODEL_FLAGS + DATA_FLAGS)
    args = parser.parse_args()
    check_output(args.output, args.overwrite)
    check_flags(args)
    if args.fold_batchnorm and args.output.suffix not in PROGRAM_SUFFIXES:
        raise InputError(f"--fold-batchnorm: only into {' and '.join(PROGRAM_SUFFIXES)}")
    return args


def check_output(path: Path, overwrite: bool):
    """Before any work is done."""
    if path.suffix and path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: unknown suffix {path.suffix!r}; supported: {', '.join(SUFFIXES)}, and a name"
            " without one for a run directory"
        )
    if path.suffix and not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.absolute().parent} does not exist")
    if not path.exists():
        return
    if not overwrite:
        raise InputError(f"{path} exists; replace it with --overwrite")
    if path.is_dir() and (path.suffix or not (path / "config.json").exists()):
        raise InputError(f"{path} is a directory and no run: it is not replaced")


def check_flags(args):
    """Files of weights have no place for what these flags say."""
    if not args.output.suffix or args.output.suffix in PROGRAM_SUFFIXES:
        return
    for name in ("config", "class_names", *DATA_FLAGS, *(MODEL_FLAGS if args.training else ())):
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: not into {args.output.suffix}, which does not hold it")


def read_weights(path: Path) -> dict[str, np.ndarray]:
    if path.suffix in TORCH_SUFFIXES and not path.is_dir():
        return convert.translate_names(_convert_torch.read_weights(path))
    return convert.translate_names(serve.load_weights(path))


def requested_config(args) -> TrainConfig:
    """What --config or else the run says, and the flags."""
    run = args.input / "config.json" if args.input.is_dir() else None
    source = args.config or run
    config = config_from_file(source) if source else TrainConfig()
    return cli.merge(config, cli.requested_values(args))


def make_run(args, arrays, architecture: convert.Architecture) -> LoadedRun:
    """A run of these weights, with as much of data as the flags ask for."""
    config, channels = requested_config(args), architecture.in_channels
    config, names = adopt.with_model_of(config, architecture, arrays), ()
    described = args.dataset or args.class_names or args.config
    if args.input.is_dir() and not described:
        names = serve.load_run(args.input).class_names
    elif args.class_names or (args.output.suffix and not described):
        config = adopt.without_data(config, args.dataset, channels)
        if args.class_names:
            names = adopt.class_names(args.class_names, config.model.num_classes)
    else:
        config, dataset = adopt.with_data(config, channels)
        names = dataset.class_names
    environment.configure_jax(config)
    return adopt.as_run(arrays, config, names, channels)


def write_run(path: Path, run: LoadedRun, arrays: dict[str, np.ndarray], source: str):
    """A finished run."""
    report = {
        "splits": {},
        "converted_from": source,
        "weights_sha256": digest(arrays),
        "command": cli.command_line(),
        "environment": environment.describe(num_devices=1),
    }
    export.write_run(
        path,
        run.config,
        steps.make_state(run.variables, run.config),
        class_names=run.class_names,
        channels=run.channels,
        progress={},
        report=report,
    )


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Of names and numbers, in torch's order."""
    sha = hashlib.sha256()
    for name, array in arrays.items():
        sha.update(name.encode() + array.tobytes())
    return sha.hexdigest()


def convert_weights(args):
    arrays, out = read_weights(args.input), args.output
    arch = args.arch or convert.nearest_architecture(arrays).arch
    architecture = convert.describe(arrays, arch, args.stem)
    arrays = convert.conform(arrays, architecture.shapes())
    if out.suffix == ".safetensors":
        export.write_safetensors(out, arrays)
    elif out.suffix in TORCH_SUFFIXES:
        _convert_torch.write_weights(out, arrays)
    elif out.suffix:
        write_program(args, make_run(args, arrays, architecture))
    else:
        write_run(out, make_run(args, arrays, architecture), arrays, args.input.name)
    print(f"{architecture}: {out}")


def write_program(args, run: LoadedRun):
    if args.output.suffix == ".onnx":
        _convert_torch.write_onnx(args.output, run, fold_batchnorm=args.fold_batchnorm)
    else:
        served = run.without_batchnorm() if args.fold_batchnorm else run
        export.write_stablehlo(args.output, served, run)


def training_to_run(args) -> int:
    """A training of PyTorch -> a run that goes on with train.py --resume.

    Which epoch was the best, and how long early stopping has waited, is not in PyTorch's file: the
    run looks for the best among the epochs that are left.
    """
    if not args.config or args.class_names:
        raise InputError("--training needs --config FILE of the run that is to go on, and its data")
    config, dataset = adopt.with_data(requested_config(args), None)
    environment.configure_jax(config)
    arrays = _convert_torch.read_training(args.input, config, dataset.channels)
    run = adopt.as_run(arrays["model"], config, dataset.class_names, dataset.channels)
    state = steps.make_state(run.variables, config)
    state = convert_training.load_training_arrays(state, arrays, config.optimizer)
    per_epoch = pipeline.steps_per_epoch(len(dataset.train), config.batch_size)
    epoch, step = divmod(arrays["step"], max(1, per_epoch))
    if epoch >= config.epochs:
        raise InputError(
            f"{args.input}: its {arrays['step']} steps are all {config.epochs} epochs of"
            f" {args.config}: nothing is left to train; give a config of more epochs, or convert"
            " the weights alone, without --training"
        )
    export.write_run(
        args.output,
        config,
        state,
        class_names=run.class_names,
        channels=run.channels,
        progress={"epoch": epoch, "step_in_epoch": step},
    )
    return arrays["step"]


def convert_a_training(args):
    if args.input.is_dir() and args.output.suffix in TORCH_SUFFIXES:
        step = _convert_torch.write_training(args.output, args.input)
    elif args.input.suffix in TORCH_SUFFIXES and not args.output.suffix:
        step = training_to_run(args)
    else:
        raise InputError("--training goes from a run directory to .pt, or from .pt to one")
    print(f"training after {step} steps: {args.output}")


def main():
    args = parse()
    try:
        if args.training:
            convert_a_training(args)
        else:
            convert_weights(args)
    except export.DamagedExport as error:
        raise cli.CheckFailed(str(error)) from None


if __name__ == "__main__":
    cli.run_command(main)
