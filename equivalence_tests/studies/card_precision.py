"""Rounding of JAX and of PyTorch on one card: logits and gradients against float64, by precision.

    python -m equivalence_tests.studies.card_precision     # results/card-precision.json

Both frameworks run the same weights and images under each `--precision`, and under bfloat16. Equal
settings have errors of one size. Exit status: 1 if those of the two differ by more than `SAME`.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

import flax_resnet
from equivalence_tests import results
from equivalence_tests.parity import inputs, torch_side
from flax_resnet.commands import exits
from flax_resnet.config import TrainConfig
from flax_resnet.interop.training_state import named_arrays
from flax_resnet.training.network import Network
from torch_ref.environment import configure_torch
from torch_ref.steps import autocast

NETWORKS = ("resnet18", "resnet20", "resnet50")
BATCH = 8
SETTINGS = {
    "highest": ("highest", "float32"),
    "default": ("default", "float32"),
    "tf32": ("tf32", "float32"),
    "bfloat16": ("default", "bfloat16"),
}
"""{title: (precision, type that the network computes in)}"""

SAME = 2.0
"""The largest ratio of two errors that counts as one size. The settings differ by 1,000 (float32
and TF32) and by 8 (TF32 and bfloat16)."""


def of_torch(case: inputs.Case, dtype, device: str, title: str | None) -> dict[str, np.ndarray]:
    """Logits and gradients of a training step's loss: {name: array}."""
    compute = dtype
    if title:
        precision, name = SETTINGS[title]
        configure_torch(TrainConfig(model={"arch": case.arch, "precision": precision}))
        compute = getattr(torch, name)
    model = torch_side.make_model(case, dtype).to(device).train()
    images = torch.from_numpy(case.images[0]).permute(0, 3, 1, 2)
    images = images.to(device, next(model.parameters()).dtype)
    labels = torch.from_numpy(case.labels[0]).to(device)
    with autocast(torch.device(device), compute) if title else torch.enable_grad():
        logits = model(images)
    F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    found = {"logits": logits} | {name: p.grad for name, p in model.named_parameters()}
    return {name: x.detach().double().cpu().numpy() for name, x in found.items()}


def of_jax(case: inputs.Case, title: str) -> dict[str, np.ndarray]:
    """The same in JAX."""
    precision, dtype = SETTINGS[title]
    model = flax_resnet.create_model(
        case.arch,
        case.num_classes,
        stem=case.stem,
        precision=precision,
        dtype=dtype if dtype != "float32" else None,
    )
    network = Network(flax_resnet.load_state_dict(model, case.arrays))

    def loss(params, images, labels):
        variables = network.initial._replace(params=params)
        logits = network.apply(variables, images, train=True)[0].astype(jnp.float32)
        each = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
        return -each.mean(), logits

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    gradients, logits = gradient(network.initial.params, case.images[0], case.labels[0])
    return {"logits": np.asarray(logits, np.float64)} | named_arrays(gradients)


def errors(got: dict, reference: dict) -> dict[str, float]:
    """Norm of the difference over the norm of the reference, for the logits and all gradients."""
    gradients = [name for name in reference if name != "logits"]
    return {
        what: float(
            np.sqrt(sum(np.sum(np.square(got[n] - reference[n])) for n in names))
            / np.sqrt(sum(np.sum(np.square(reference[n])) for n in names))
        )
        for what, names in (("logits", ["logits"]), ("gradients", gradients))
    }


def row(arch: str) -> dict:
    """{setting: {framework: {"logits", "gradients": error}}} of a network."""
    case = inputs.make_case(arch, batch=BATCH)
    reference = of_torch(case, np.float64, "cpu", None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for title in SETTINGS:
        ours, theirs = of_jax(case, title), of_torch(case, np.float32, device, title)
        found[title] = {
            "jax": errors(ours, reference),
            "torch": errors(theirs, reference),
            "between": errors(ours, theirs),
        }
    return found


def unequal(rows: dict) -> list[str]:
    """A line for each error that has another size in JAX than in PyTorch."""
    return [
        f"{arch}, {title}, {what}: {found['jax'][what]:.1e} in JAX, {found['torch'][what]:.1e}"
        for arch, settings in rows.items()
        for title, found in settings.items()
        for what in found["jax"]
        if not 1 / SAME <= found["jax"][what] / found["torch"][what] <= SAME
    ]


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = {}
    for arch in NETWORKS:
        rows[arch] = row(arch)
        for title, found in rows[arch].items():
            sizes = {k: f"{v['logits']:.1e}, {v['gradients']:.1e}" for k, v in found.items()}
            print(f"{arch}, {title}: logits and gradients {sizes}")
        results.write("card-precision", {"torch": torch.__version__, "rows": rows})
    if faults := unequal(rows):
        print("\n".join(faults), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    exits.run_command(main)
