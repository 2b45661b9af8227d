"""The part of the command `parity` that compares two networks of the user's own."""

from pathlib import Path

from equivalence_tests.parity import loading
from flax_resnet.commands import exits
from flax_resnet.runs import environment

PLACE = "MODULE:CALLABLE"


def add_flags(parser):
    """Adds the flags that belong to --jax-model."""
    parser.add_argument(
        "--own-weights",
        action="store_true",
        help="compare with PyTorch's weights, not with random ones",
    )
    about = "your function from a PyTorch state_dict to the variables of --jax-model, to be checked"
    parser.add_argument("--converter", metavar=PLACE, help=about)
    parser.add_argument(
        "--mapping", type=Path, metavar="FILE", help="JSON file that says which tensor of PyTorch"
        " is which array of JAX; read if it exists, else written",
    )  # fmt: skip
    parser.add_argument(
        "--optax-optimizer", metavar=PLACE, help="function without arguments that returns an"
        " Optax GradientTransformation, to be compared with --torch-optimizer",
    )  # fmt: skip
    about = "function from parameters to a PyTorch optimizer"
    parser.add_argument("--torch-optimizer", metavar=PLACE, help=about)


def compared(args) -> dict:
    """The document of a comparison of --jax-model with --torch-model."""
    from equivalence_tests.parity import own_model
    from equivalence_tests.parity.ports.judge import compare_models

    net = own_model.read(args.torch_model)
    jax_net = loading.load(args.jax_model, "--jax-model")
    optax_optimizer = args.optax_optimizer and loading.load(
        args.optax_optimizer, "--optax-optimizer"
    )
    report = compare_models(
        jax_net,
        net,
        image_size=args.image_size,
        own_weights=args.own_weights,
        converter=args.converter and loading.find(args.converter, "--converter"),
        mapping=args.mapping,
        optax_optimizer=optax_optimizer or None,
        torch_optimizer=args.torch_optimizer
        and loading.find(args.torch_optimizer, "--torch-optimizer"),
    )
    height, width = report.image_size
    return report.document() | {
        "subject": args.jax_model,
        "standard": args.torch_model,
        "what": f"images {height}x{width}, float64, {len(report.mapping.pieces)} tensors placed"
        " by structure",
        "sentence": report.sentence(),
        "lines": report.lines(),
        "first_divergence": None,
        "command": exits.command_line(),
        "environment": environment.describe(1),
    }
