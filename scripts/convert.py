"""Convert weights between PyTorch's files, safetensors and run directories.

python scripts/convert.py resnet50.pth resnet50.safetensors
python scripts/convert.py runs/resnet20-birds birds.pth                 # the best weights
python scripts/convert.py resnet20.th runs/pretrained --dataset folder:DIR
python scripts/convert.py resnet50.pth runs/imagenet --class-names NAMES.txt --image-size 224 \\
    --resize-size 256 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225
python scripts/convert.py runs/resnet20-birds birds.pt --training       # optimizer and all
python scripts/convert.py birds.pt runs/birds --training --config runs/resnet20-birds/config.json
"""

import hashlib
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np

from flax_resnet import cli, convert, convert_training, environment, export, serve, steps
from flax_resnet.checkpoint import Checkpoints
from flax_resnet.config import InputError, TrainConfig
from flax_resnet.data.prepare import prepare
from flax_resnet.models import create_from_config
from flax_resnet.run_directory import config_from_file

TORCH_SUFFIXES = (".pth", ".pt", ".th")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
FLAGS = ("arch", "stem", "dataset", "image_size", "resize_size", "grayscale", "mean", "std")
NO_DATA = "folder:left-out"  # of a run directory made from class names alone


def parse():
    parser = cli.Parser(prog="convert.py", description=__doc__)
    parser.add_argument("input", type=Path, metavar="IN", help="run directory or weights file")
    parser.add_argument("output", type=Path, metavar="OUT", help=", ".join(SUFFIXES) + ", or none")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument(
        "--training",
        action="store_true",
        help="a training in its middle: run directory <-> .pt with optimizer, average and step",
    )
    parser.add_argument("--config", metavar="FILE", help="run directory: start from this config")
    parser.add_argument(
        "--class-names",
        metavar="FILE|A,B,...",
        help="run directory: the classes, one a line, where --dataset is not at hand",
    )
    cli.add_config_flags(parser, FLAGS)
    return parser.parse_args()


def check_output(path: Path, overwrite: bool):
    """Before any work is done."""
    if path.suffix and path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: unknown suffix {path.suffix!r}; supported: {', '.join(SUFFIXES)}, and a name"
            " without one for a run directory"
        )
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.absolute().parent} does not exist")
    if not path.exists():
        return
    if not overwrite:
        raise InputError(f"{path} exists; replace it with --overwrite")
    if path.is_dir() and (path.suffix or not (path / "config.json").exists()):
        raise InputError(f"{path} is a directory and no run: it is not replaced")


def torch_ref():
    """The PyTorch side, which is an extra."""
    try:
        import torch_ref.optim
        import torch_ref.training_state
    except ModuleNotFoundError as error:
        raise InputError(
            f"PyTorch's files need {error.name}: uv run --extra torch scripts/convert.py ..."
        ) from None
    return torch_ref


def reading(path: Path, read, *arguments):
    """The outcome of one of torch_ref's readers, whose errors become one line."""
    try:
        return read(path, *arguments)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(str(error)) from None


def read_weights(path: Path) -> dict[str, np.ndarray]:
    if path.suffix in TORCH_SUFFIXES and not path.is_dir():
        arrays = reading(path, torch_ref().checkpoint.load)
    else:
        arrays = serve.load_weights(path)
    return convert.translate_names(arrays)


def write_file(path: Path, arrays: dict[str, np.ndarray]):
    if path.suffix == ".safetensors":
        export.write_safetensors(path, arrays)
    else:
        files = torch_ref().checkpoint
        export.write_verified(path, arrays, files.save, files.load)


def build_config(args, architecture=None, arrays=None) -> TrainConfig:
    """What --config or the run and the flags say, and what the weights say of the model."""
    run = args.input / "config.json" if args.input.is_dir() else None
    source = args.config or run
    config = config_from_file(source) if source else TrainConfig()
    config = cli.merge(config, cli.requested_values(args))
    if architecture is None:
        return config
    model = replace(
        config.model,
        arch=architecture.arch,
        stem=architecture.stem,
        num_classes=architecture.num_classes,
        dtype="float64" if arrays["fc.weight"].dtype == np.float64 else config.model.dtype,
    )
    return replace(config, model=model)


def complete(config: TrainConfig, args, channels: int | None):
    """The config with its data's sizes and statistics, class names and, with a data set, channels
    and number of training images."""
    if args.class_names:
        config = without_data(config, args, channels)
        return config, class_names(args.class_names, config), channels, None
    # Nothing is trained: no batch has to fit, no image has to be kept.
    loose = replace(config, batch_size=1, data=replace(config.data, cache="none"))
    prepared = prepare(loose)
    data = replace(prepared.config.data, cache=config.data.cache)
    full = replace(prepared.config, batch_size=config.batch_size, data=data)
    dataset = prepared.dataset
    if channels not in (None, dataset.channels):
        raise InputError(
            f"the weights are for {channels} channels, {data.dataset} has {dataset.channels}"
        )
    return full, dataset.class_names, dataset.channels, len(dataset.train)


def without_data(config: TrainConfig, args, channels: int) -> TrainConfig:
    data = config.data
    if None in (data.image_size, data.mean, data.std):
        raise InputError("--class-names needs --image-size, --mean and --std too")
    if len(data.mean) != channels or len(data.std) != channels:
        raise InputError(f"--mean and --std need {channels} values, one a channel of the weights")
    resize = data.resize_size or data.image_size
    data = replace(data, dataset=args.dataset or NO_DATA, resize_size=resize)
    return replace(config, data=data)


def class_names(text: str, config: TrainConfig) -> tuple[str, ...]:
    """A file's lines, or the words between commas."""
    path = Path(text)
    try:
        names = path.read_text().splitlines() if path.is_file() else text.split(",")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--class-names: {text} is no readable text") from None
    names = tuple(name.strip() for name in names if name.strip())
    if len(names) != config.model.num_classes:
        where = text if path.is_file() else f"{text} (a list: there is no such file)"
        raise InputError(
            f"--class-names: {len(names)} names in {where}, the weights have"
            f" {config.model.num_classes}"
        )
    return names


def write_run(args, arrays: dict[str, np.ndarray], architecture: convert.Architecture):
    """A finished run of these weights."""
    config, channels = build_config(args, architecture, arrays), architecture.in_channels
    if args.input.is_dir() and not (args.dataset or args.class_names or args.config):
        names = serve.load_run(args.input).class_names
    else:
        config, names, _, _ = complete(config, args, channels)
    environment.configure_jax(config)
    model = create_from_config(config.model, in_channels=channels)
    convert.load_state_dict(model, arrays)
    state = steps.make_state(network_of(model, config).initial, config)
    report = {
        "splits": {},
        "converted_from": args.input.name,
        "weights_sha256": digest(arrays),
        "command": cli.command_line(),
        "environment": environment.describe(num_devices=1),
    }
    export.write_run(
        args.output,
        config,
        state,
        class_names=names,
        channels=channels,
        progress={},
        report=report,
    )


def network_of(model, config: TrainConfig) -> steps.Network:
    return steps.Network(model, freeze_backbone=config.freeze_backbone)


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Of names and numbers, in torch's order."""
    sha = hashlib.sha256()
    for name, array in arrays.items():
        sha.update(name.encode() + array.tobytes())
    return sha.hexdigest()


def convert_weights(args):
    arrays = read_weights(args.input)
    arch = args.arch or convert.nearest_architecture(arrays).arch
    architecture = convert.describe(arrays, arch, args.stem)
    arrays = convert.conform(arrays, architecture.shapes())
    if args.output.suffix:
        write_file(args.output, arrays)
    else:
        write_run(args, arrays, architecture)
    print(f"{architecture}: {args.output}")


def torch_training(config: TrainConfig, channels: int):
    """Model, optimizer and moving average of the PyTorch side, as a run's config has them."""
    if config.schedule.schedule == "plateau":
        raise InputError("--training: the cuts of the plateau schedule do not convert")
    twin, model, rule = torch_ref(), config.model, config.optimizer
    net = twin.create_model(
        model.arch, model.num_classes, channels, stem=model.stem, dropout=model.dropout
    )
    net = net.double() if model.dtype == "float64" else net
    wanted = inspect.signature(twin.optim.make_optimizer).parameters
    options = {name: getattr(rule, name) for name in wanted if hasattr(rule, name)}
    optimizer = twin.optim.make_optimizer(net, **options)
    ema = twin.optim.make_ema(net, rule.ema_decay) if rule.ema_decay else None
    return net, optimizer, ema


def run_to_torch(args):
    """The latest state of a run -> a file of `torch_ref.training_state`."""
    document, config, _, state = serve.restore(args.input, Checkpoints.latest)
    arrays = convert_training.training_arrays(state, config.optimizer)
    parts = torch_training(config, document["channels"])
    files = torch_ref().training_state
    step = files.load_training_arrays(arrays, *parts, config.optimizer.accumulate_steps)

    def load(path):
        again = torch_training(config, document["channels"])
        back = files.load(path, *again)
        return convert_training.flat(files.training_arrays(*again, back))

    export.write_verified(
        args.output,
        convert_training.flat(files.training_arrays(*parts, step)),
        lambda path, _: files.save(path, *parts, step),
        load,
    )
    return step


def torch_to_run(args):
    """The inverse; the run goes on with train.py --resume."""
    if not args.config or args.class_names:
        raise InputError("--training needs --config FILE of the run that is to go on, and its data")
    config, names, channels, num_images = complete(build_config(args), args, None)
    environment.configure_jax(config)
    parts = torch_training(config, channels)
    files = torch_ref().training_state
    step = reading(args.input, files.load, *parts)
    network = network_of(create_from_config(config.model, in_channels=channels), config)
    state = convert_training.load_training_arrays(
        steps.make_state(network.initial, config),
        files.training_arrays(*parts, step),
        config.optimizer,
    )
    epoch, step_in_epoch = divmod(step, max(1, num_images // config.batch_size))
    progress = {"epoch": epoch, "step_in_epoch": step_in_epoch}
    export.write_run(
        args.output, config, state, class_names=names, channels=channels, progress=progress
    )
    return step


def convert_a_training(args):
    if args.input.is_dir() and args.output.suffix in TORCH_SUFFIXES:
        step = run_to_torch(args)
    elif args.input.suffix in TORCH_SUFFIXES and not args.output.suffix:
        step = torch_to_run(args)
    else:
        raise InputError("--training goes from a run directory to .pt, or from .pt to one")
    print(f"training after {step} steps: {args.output}")


def main():
    args = parse()
    check_output(args.output, args.overwrite)
    try:
        if args.training:
            convert_a_training(args)
        else:
            convert_weights(args)
    except export.DamagedExport as error:
        raise cli.CheckFailed(str(error)) from None


if __name__ == "__main__":
    cli.run_command(main)
