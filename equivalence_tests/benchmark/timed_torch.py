"""The PyTorch side of the throughput comparison: the twin (`torch_ref`'s network) at full speed.

PyTorch gets channels last, autocast to bfloat16, fused SGD, gradients set to None, cuDNN's
autotuning and every mode of torch.compile. On a CPU, variants with -kept-memory use the allocator
settings that `flax_resnet` trains with. Inference also has folded: torch.fx merges BatchNorm into
the convolutions, then torch.compile. Variant torchvision is torchvision's own network, eager, with
the same weights, and shows that the twin is not slow.
"""

import numpy as np
import torch
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse

import torch_ref
from equivalence_tests.benchmark import timing
from equivalence_tests.benchmark.timing import Job, Program, Skipped
from flax_resnet.config import OptimizerConfig
from torch_ref import checkpoint, steps
from torch_ref.steps import autocast, to_device

COMPILE_MODES = {
    "compile": "default",
    "compile-kept-memory": "default",
    "compile-reduce-overhead": "reduce-overhead",
    "compile-max-autotune": "max-autotune",
    "folded": "default",
}


def build(job: Job) -> Program:
    device = configure(job)
    net = torchvisions_net(job) if job.variant == "torchvision" else twin(job)
    with np.load(job.weights) as arrays:
        net.load_state_dict(checkpoint.to_tensors(dict(arrays)))
    dtype = getattr(torch, job.dtype)
    images, labels = map(torch.from_numpy, timing.synthetic_batch(job))
    images = to_device(images.permute(0, 3, 1, 2), device, dtype)
    net = net.to(device, images.dtype, memory_format=torch.channels_last)
    net.train(job.mode == "train")
    if job.variant == "folded":
        net = fuse(net)
    called = net
    if job.variant in COMPILE_MODES:
        called = torch.compile(net, mode=COMPILE_MODES[job.variant], dynamic=False, fullgraph=True)
    if job.mode == "train":
        return training(net, called, images, labels.to(device), dtype)
    return inference(called, images, dtype)


def configure(job: Job) -> torch.device:
    if job.variant == "folded" and job.mode == "train":
        raise Skipped("for inference only")
    torch.set_num_threads(timing.num_cores())
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if job.device == "gpu" and not torch.cuda.is_available():
        raise Skipped("PyTorch sees no GPU here")
    if job.variant == "compile-reduce-overhead" and job.device == "cpu":
        raise Skipped("CUDA graphs need a GPU; without them it is compile")
    if job.variant.endswith("-kept-memory") and job.device == "gpu":
        raise Skipped("for the CPU only, whose allocator it sets")
    return torch.device("cuda" if job.device == "gpu" else "cpu")


def twin(job: Job) -> nn.Module:
    return torch_ref.create_model(job.arch, job.num_classes, 3, stem=job.stem)


def torchvisions_net(job: Job) -> nn.Module:
    if job.arch not in torchvision.models.list_models():
        raise Skipped(f"torchvision has no {job.arch}")
    net = torchvision.models.get_model(job.arch, num_classes=job.num_classes)
    if job.stem == "cifar":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def training(net, called, images, labels, dtype) -> Program:
    optimizer = torch.optim.SGD(net.parameters(), **timing.RULE, fused=True)
    rule, last = OptimizerConfig(label_smoothing=timing.LABEL_SMOOTHING), {}

    def step():
        last["loss"] = steps.train_step(called, optimizer, images, labels, rule, dtype=dtype)

    return Program(step, lambda: wait(images.device), lambda: [last["loss"].item()])


def inference(called, images, dtype) -> Program:
    last = {}

    @torch.no_grad()
    def step():
        with autocast(images.device, dtype):
            last["logits"] = called(images)

    return Program(
        step,
        lambda: wait(images.device),
        lambda: last["logits"][: timing.CHECKED_IMAGES].double().flatten().tolist(),
    )


def wait(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_ceilings(job: Job) -> dict:
    device = configure(job)
    side, count = timing.ceiling_sizes(job)
    dtype = getattr(torch, job.dtype)
    torch.manual_seed(0)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.randn(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    finish = lambda: wait(device)  # noqa: E731
    seconds = timing.best_seconds(lambda: matrix @ matrix, finish)
    copying = timing.best_seconds(lambda: target.copy_(source), finish)
    return {"flops": 2 * side**3 / seconds, "bytes": 2 * count * dtype.itemsize / copying}


def describe(job: Job) -> dict:
    gpu = job.device == "gpu"
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    if gpu:
        versions["cudnn"] = torch.backends.cudnn.version()
    return {"name": torch.cuda.get_device_name() if gpu else "cpu"} | versions


def peak_memory(job: Job) -> int:
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    timing.main(timing.Side(build, measure_ceilings, describe, peak_memory))
