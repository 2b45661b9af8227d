"""Times the programs that serve a trained network, and says what each of them predicts.

    python -m equivalence_tests.benchmark.serving runs/birds    # 30 minutes; results/serving.json
    python -m equivalence_tests.benchmark.serving runs/birds --only PyTorch

Each program answers in a process of its own, on one core and on two, and the processes take turns.
"First answer" is the time from the start of loading to the logits of one image. It includes the
compilation, because each process has an empty compilation cache. The other times are medians of
many calls. Every call starts from uint8 pixels.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from equivalence_tests import results
from equivalence_tests.benchmark import charts
from flax_resnet import machine

Program = Callable[[np.ndarray], np.ndarray]
"""uint8 images `[B, H, W, C]` -> logits or probabilities `[B, K]`."""

BATCH = 64
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc's settings to keep freed memory, because virtual machines can be slow to give it anew."""

FILES = {
    "StableHLO": ("net.stablehlo", ()),
    "StableHLO, folded": ("folded.stablehlo", ("--fold-batchnorm",)),
    "ONNX Runtime": ("net.onnx", ()),
    "ONNX Runtime, folded": ("folded.onnx", ("--fold-batchnorm",)),
    "ONNX Runtime, int8": ("int8.onnx", ("--int8",)),
    "PyTorch": ("net.pth", ()),
    "PyTorch, int8": ("int8.pth", None),
}
"""{program: its file, and the flags with which `flax-resnet convert` writes it, if it does}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    about = "measure these programs again and keep the others' figures"
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS, help=about)
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
        print(json.dumps(timed(args.program, args.run, args.cores), allow_nan=False))
        return
    about = facts(args.run)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.run)
        programs = kept(args.only) | measure(Path(name), args.only, args.rounds)
    programs = {name: programs[name] for name in PROGRAMS}
    results.write("serving", about | {"batch_size": BATCH, "programs": programs})
    title = f"{about['arch']}, {about['image_shape'][0]} px, batches of {BATCH}, on a CPU"
    charts.serving(results.FOLDER / "serving.png", programs, title)


def kept(measured) -> dict[str, dict]:
    """The figures in the results file of the programs that are not measured."""
    others = set(PROGRAMS) - set(measured)
    return {name: results.read("serving")["programs"][name] for name in others}


def prepare(folder: Path, run_dir: Path):
    """Write the exported files, the config, and the test images and labels as arrays."""
    from flax_resnet.commands import convert, convert_int8, evaluate
    from flax_resnet.config import to_dict
    from flax_resnet.data import pipeline
    from flax_resnet.data.prepare import evaluation_decoder
    from flax_resnet.interop.loaded_run import load_run

    (folder / "run").symlink_to(run_dir.resolve())
    by_convert = [row for row in FILES.values() if row[1] is not None]
    for file, flags in by_convert:
        command = [sys.executable, "scripts/convert.py", run_dir, folder / file, *flags]
        subprocess.run(list(map(str, command)), check=True)
    run = load_run(run_dir)
    (folder / "config.json").write_text(json.dumps(to_dict(run.config), allow_nan=False))
    dataset = evaluate.open_data(run, None, "test")
    test = dataset.test
    images = pipeline.decode_all(test, evaluation_decoder(run.config.data), np.arange(len(test)))
    np.savez(folder / "test.npz", images=images, labels=test.labels)
    chosen = convert_int8.calibration_images(run, dataset, convert.CALIBRATION_IMAGES)
    quantize_in_pytorch(folder, chosen)


def quantize_in_pytorch(folder: Path, images: np.ndarray):
    """Write PyTorch's int8 network, calibrated with uint8 `[N, H, W, C]`."""
    import torch

    from equivalence_tests.benchmark import torch_int8

    net, normalized = twin(folder)
    batches = [normalized(batch) for batch in np.split(images, range(BATCH, len(images), BATCH))]
    torch.save(torch_int8.quantized(net, batches).state_dict(), folder / FILES["PyTorch, int8"][0])


def facts(run_dir: Path) -> dict:
    from flax_resnet.interop.loaded_run import load_run

    run = load_run(run_dir)
    facts = {"arch": run.config.model.arch, "stem": run.config.model.stem}
    return facts | {"image_shape": run.image_shape}


def measure(folder: Path, names, rounds: int) -> dict[str, dict]:
    """{program: its figures}; each round runs all programs in turn."""
    found = {}
    for _ in range(rounds):
        for name in names:
            for cores in (1, 2):
                outcome = in_process(folder, name, cores)
                found.setdefault(name, {}).setdefault(cores, []).append(outcome)
                print(name, cores, outcome["milliseconds"], flush=True)
    if "JAX" not in found:
        in_process(folder, "JAX", 2)
    reference = predictions(folder, "JAX")
    labels = np.load(folder / "test.npz")["labels"]
    return {
        name: {
            "file_bytes": os.path.getsize(folder / FILES[name][0]) if name in FILES else None,
            "accuracy": float(np.mean(predictions(folder, name) == labels)),
            "equal_predictions": float(np.mean(predictions(folder, name) == reference)),
            "cores": {str(cores): medians(rounds) for cores, rounds in by_cores.items()},
            "revision": machine.revision(),
        }
        for name, by_cores in found.items()
    }


def medians(outcomes: list[dict]) -> dict:
    """The median of each figure over the rounds, and all rounds."""
    middle = {name: statistics.median(each[name] for each in outcomes) for name in outcomes[0]}
    return middle | {"rounds": outcomes}


def in_process(folder: Path, name: str, cores: int) -> dict:
    command = [sys.executable, "-m", __spec__.name, str(folder), "--program", name]
    variables = os.environ | KEEP_MEMORY
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile Python's sources
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [*command, "--cores", str(cores)],
            check=True,
            stdout=subprocess.PIPE,
            env=variables | {"XDG_CACHE_HOME": cache},
        )
    return json.loads(done.stdout.splitlines()[-1])


def predictions(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.npy")


def timed(name: str, folder: Path, cores: int) -> dict:
    """The figures of one program in this process; its predictions go to a file."""
    with np.load(folder / "test.npz") as arrays:
        images = arrays["images"]
    started = time.perf_counter()
    program = PROGRAMS[name](folder, cores)
    program(images[:1])
    first = time.perf_counter() - started
    milliseconds = 1e3 * seconds(program, images[:1], 200)
    speed = BATCH / seconds(program, images[:BATCH], 20)
    if cores == 2 and not (path := folder / f"{name}.npy").exists():
        batches = np.split(images, range(BATCH, len(images), BATCH))
        np.save(path, np.concatenate([program(batch).argmax(-1) for batch in batches]))
    return {"first_answer_s": first, "milliseconds": milliseconds, "images_per_second": speed}


def seconds(program: Program, images: np.ndarray, calls: int) -> float:
    """Median seconds of a call, after a tenth as many calls to warm up."""
    found = []
    for _ in range(calls + calls // 10):
        started = time.perf_counter()
        program(images)
        found.append(time.perf_counter() - started)
    return statistics.median(found[calls // 10 :])


def jax_run(folder: Path, cores: int, *, folded: bool = False, dtype: str = "float32") -> Program:
    from flax_resnet.interop.loaded_run import load_run
    from flax_resnet.models import create_from_config
    from flax_resnet.training.network import Network

    run = load_run(folder / "run")
    model = replace(run.config.model, dtype=dtype)
    run = replace(run, network=Network(create_from_config(model, in_channels=run.channels)))
    return (run.without_batchnorm() if folded else run).predict


def stablehlo(name: str, folder: Path, cores: int) -> Program:
    import jax

    exported = jax.export.deserialize(bytearray((folder / FILES[name][0]).read_bytes()))
    program = jax.jit(exported.call)
    return lambda images: np.asarray(program(images))


def onnx(name: str, folder: Path, cores: int) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    path, on = folder / FILES[name][0], ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=on)
    notes = session.get_modelmeta().custom_metadata_map
    mean, std = (np.float32(json.loads(notes[name])) for name in ("mean", "std"))

    def program(images):
        normalized = (np.float32(images) / 255 - mean) / std
        return session.run(None, {"images": normalized.transpose(0, 3, 1, 2)})[0]

    return program


def twin(folder: Path):
    """The network in PyTorch, and what takes uint8 `[B, H, W, C]` to its input `[B, C, H, W]`."""
    import torch

    import torch_ref
    from flax_resnet.config import config_from_file
    from torch_ref import checkpoint

    config = config_from_file(folder / "config.json")
    net = torch_ref.create_from_config(config.model, len(config.data.mean)).eval()
    net.load_state_dict(checkpoint.to_tensors(checkpoint.load(folder / FILES["PyTorch"][0])))
    mean, std = map(torch.tensor, (config.data.mean, config.data.std))

    def normalized(images):
        return ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)

    return net, normalized


def pytorch(folder: Path, cores: int, *, kind: str = "float32") -> Program:
    import torch

    from equivalence_tests.benchmark import torch_int8
    from torch_ref import onnx_file

    torch.set_num_threads(cores)
    net, normalized = twin(folder)
    if kind == "folded":
        net = onnx_file.fold_batchnorm(net)
    if kind == "int8":
        example = normalized(np.load(folder / "test.npz")["images"][:1])
        net = torch_int8.load(folder / FILES["PyTorch, int8"][0], net, example)
    net = net.to(memory_format=torch.channels_last)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16")

    def program(images):
        with torch.inference_mode(), autocast:
            return net(normalized(images)).float().numpy()

    return program


PROGRAMS: dict[str, Callable[[Path, int], Program]] = {
    "JAX": jax_run,
    "JAX, folded": partial(jax_run, folded=True),
    "JAX, bfloat16": partial(jax_run, dtype="bfloat16"),
    **{name: partial(stablehlo, name) for name in FILES if "HLO" in name},
    **{name: partial(onnx, name) for name in FILES if "ONNX" in name},
    "PyTorch": pytorch,
    **{f"PyTorch, {kind}": partial(pytorch, kind=kind) for kind in ("folded", "bfloat16", "int8")},
}
"""{name: how the program is loaded from the folder of `prepare`, for so many cores}"""

if __name__ == "__main__":
    main()
