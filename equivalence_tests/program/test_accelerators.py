"""Programs for GPUs, compiled by XLA's own compiler without one, hold what the design promises.

Every claim has a control: a program in which the fault exists, on which the check has to fail.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from equivalence_tests.program.command import ROOT
from equivalence_tests.studies import compiled as study
from equivalence_tests.studies.compiled import FOREIGN, UNORDERED, convolutions, wide_activations
from flax_resnet import create_model, imagenet_recipes, list_models, recipes
from flax_resnet.commands import cli, exits, plan
from flax_resnet.config import TrainConfig
from flax_resnet.devices import program, targets
from flax_resnet.models import floor, layers
from flax_resnet.models.summary import stage_rows
from flax_resnet.training import ahead
from torch_ref.environment import configure_torch

SIZE, BATCH = 32, 8192  # a large batch costs nothing: nothing runs, and arrays are of real sizes
DATA = ahead.Data((SIZE, SIZE, 3), resident=0)
ARCHS = [
    pytest.param(arch, marks=[pytest.mark.slow] * (arch != "basic_cnn")) for arch in list_models()
]
"""All networks, all but one of them in the slow tier."""


def compiled(target: str, dtype: str, arch: str = "resnet20", **changes) -> ahead.Compiled:
    config = {"batch_size": BATCH, "augment": {"random_crop": 0}} | changes
    config["model"] = {"arch": arch, "num_classes": 10, "dtype": dtype} | changes.get("model", {})
    config["data"] = {"image_size": SIZE}
    config = cli.merge(TrainConfig(), config)
    return ahead.Plan(config, DATA, targets.parse(target)).compile()


@pytest.fixture(scope="module")
def bfloat16():
    """Four H100, bfloat16, deterministic."""
    return compiled("h100:4", "bfloat16", deterministic=True)


@pytest.fixture(scope="module")
def float32():
    """One H100, float32, the network of four layers."""
    return compiled("h100", "float32", "basic_cnn")


@pytest.mark.parametrize(("made", "arch"), [("bfloat16", "resnet20"), ("float32", "basic_cnn")])
def test_every_convolution_is_the_library_s_in_each_direction(made, arch, request):
    """Backward there are two for each, but for the images, whose gradient nobody needs."""
    made, count = request.getfixturevalue(made), study.convolutions_of(arch)
    assert convolutions(made) == {"forward": count, "backward": 2 * count - 1}
    wanted = {"resnet20": "bf16", "basic_cnn": "f32"}[arch]
    assert {k.dtype for k in made.kernels if k.kind == "convolution"} == {wanted}


@pytest.mark.slow
def test_with_remat_blocks_are_computed_twice_and_not_kept():
    """The backward pass computes all convolutions but the first again."""
    kept, again = (compiled("h100", "bfloat16", model={"remat": r}) for r in (False, True))
    count = study.convolutions_of("resnet20")
    assert convolutions(kept) == {"forward": count, "backward": 2 * count - 1}
    assert convolutions(again) == {"forward": count, "backward": 3 * count - 2}
    assert again.temporary_bytes < kept.temporary_bytes / 2


@pytest.mark.parametrize("made", ["bfloat16", "float32"])
def test_a_step_neither_calls_the_host_nor_computes_in_float64(made, request):
    assert not re.search(FOREIGN, request.getfixturevalue(made).text)


def test_no_activation_is_written_in_float32_in_a_bfloat16_program(bfloat16):
    assert not wide_activations(bfloat16)


@pytest.mark.control
def test_activations_in_float32_are_found(float32):
    assert wide_activations(float32)


def test_a_step_exchanges_what_it_needs_and_nothing_else(bfloat16):
    """All-reduces: two forward and one backward per BatchNorm, and one of the other gradients."""
    norms = study.convolutions_of("resnet20")
    rows = program.collectives(bfloat16.kernels)
    assert {row["kind"] for row in rows} == {"all-reduce"}
    assert {row["dtype"] for row in rows} == {"f32"}  # as PyTorch's autocast sums gradients
    assert sum(row["count"] for row in rows) == 3 * norms + 1
    assert sum(row["in_forward"] for row in rows) == 2 * norms


def test_statistics_of_groups_need_no_exchange_before_the_gradients():
    """One all-reduce of gradients, metrics and running statistics, if a group is on one device."""
    made = compiled("h100:4", "bfloat16", model={"batch_norm_images": BATCH // 4})
    [row] = program.collectives(made.kernels)
    assert (row["kind"], row["dtype"], row["count"]) == ("all-reduce", "f32", 1)
    assert row["in_forward"] == 0


def test_gradients_are_exchanged_in_half_the_bytes_if_asked_for():
    made = compiled("h100:2", "float32", "basic_cnn", parallel={"reduce_dtype": "bfloat16"})
    model = nnx.eval_shape(lambda: create_model("basic_cnn"))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    narrow, metrics = program.collectives(made.kernels)
    assert (narrow["dtype"], narrow["bytes"]) == ("bf16", 2 * parameters)
    assert (metrics["dtype"], metrics["bytes"]) == ("f32", 2 * 4)  # loss and accuracy


@pytest.mark.control
def test_left_to_the_compiler_gradients_are_summed_in_bfloat16():
    """The reason why a step reduces its gradients itself."""
    mesh = jax.sharding.Mesh(targets.devices(targets.parse("h100:2")), ("data",))
    whole, rows = (jax.NamedSharding(mesh, jax.P(axis)) for axis in (None, "data"))

    def loss(kernel, x):
        return jnp.square(jax.lax.conv(x, kernel.astype(x.dtype), (1, 1), "SAME")).sum()

    kernel = jax.ShapeDtypeStruct((16, 16, 3, 3), "float32", sharding=whole)
    x = jax.ShapeDtypeStruct((8, 16, 32, 32), "bfloat16", sharding=rows)
    step = jax.jit(jax.grad(loss), out_shardings=whole)
    text = step.lower(kernel, x).compile({"xla_gpu_autotune_level": 0}).as_text()
    found = program.collectives(program.kernels(program.parse(text)))
    assert [row["dtype"] for row in found] == ["bf16"]


def test_one_device_exchanges_nothing(float32, bfloat16):
    assert not program.collectives(float32.kernels)
    assert program.collectives(bfloat16.kernels)  # the control


def test_a_deterministic_step_adds_in_a_fixed_order(bfloat16):
    assert not re.search(UNORDERED, bfloat16.text)


def on_a_gpu(function, *shapes, dtype="float32") -> str:
    """The program of a function on one H100."""
    mesh = jax.sharding.Mesh(targets.devices(targets.parse("h100")), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    return jax.jit(function).lower(*like).compile({"xla_gpu_autotune_level": 0}).as_text()


@pytest.mark.control
def test_the_library_s_pool_adds_in_any_order():
    def pooled(x):
        return layers.max_pool(x, 3, 2, padding=1, kernels="library").sum()

    assert re.search(UNORDERED, on_a_gpu(jax.grad(pooled), (8, 16, 16, 8)))


@pytest.mark.control
def test_a_callback_and_float64_are_found():
    def noisy(x):
        jax.debug.callback(lambda x: None, x)
        return x

    assert re.search(FOREIGN, jax.jit(noisy).lower(1.0).compile().as_text())  # on the CPU
    with jax.enable_x64(True):
        assert re.search(FOREIGN, on_a_gpu(lambda x: x + 1, (8,), dtype="float64"))


@pytest.mark.control
def test_a_convolution_that_is_recomputed_is_counted():
    def loss(kernel, x, once):
        def block(x):
            for _ in range(2):
                x = nnx.relu(jax.lax.conv(x, kernel, (1, 1), "SAME"))
            return x

        return (block if once else jax.checkpoint(block))(x).sum()

    def count(once):
        text = on_a_gpu(jax.value_and_grad(partial(loss, once=once)), (8, 8, 3, 3), (4, 8, 8, 8))
        return sum(k.kind == "convolution" for k in program.kernels(program.parse(text)))

    assert count(once=False) > count(once=True)


def test_every_layer_is_found_in_its_program(bfloat16):
    model = nnx.eval_shape(lambda: create_model("resnet20"))
    names = {m.layer_name for _, m in nnx.iter_modules(model) if hasattr(m, "layer_name")}
    found = bfloat16.by_layer()
    assert {layer for layer, _ in found} >= names
    assert {"layer1.0.conv1", "layer1.0", "layer3.2.bn2", "fc"} <= names
    nowhere = sum(size for (layer, _), size in found.items() if layer == program.BETWEEN)
    assert nowhere < 0.02 * bfloat16.bytes


def test_flops_are_three_times_those_of_the_forward_pass(bfloat16):
    """Nobody computes the gradient of the images, so the first convolution counts twice."""
    model = create_model("resnet20")
    images = BATCH // 4
    forward = sum(row["flops"] for row in stage_rows(model, DATA.image_shape))
    first = 2 * SIZE**2 * 9 * 3 * 16
    assert bfloat16.flops == pytest.approx(images * (3 * forward - first), rel=2e-3)


def test_a_program_stays_above_its_floor(bfloat16):
    config = cli.merge(TrainConfig(), {"batch_size": BATCH, "model": {"arch": "resnet20"}})
    config = cli.merge(config, {"model": {"dtype": "bfloat16", "num_classes": 10}})
    assert 1 < bfloat16.bytes / plan.floor_bytes(config, DATA, 4) < 1.5


def test_the_floor_of_a_small_network_is_counted_by_hand():
    model = nnx.eval_shape(lambda: create_model("basic_cnn", kernels="library"))
    found = floor.passes(model, (16, 16, 3))
    convolved = (256 * (3 + 32)) + (64 * (32 + 64)) + (16 * (64 + 128))
    pooled = 32 * (256 + 64) + 64 * (64 + 16) + 128 * (16 + 4)
    image = 256 * 3
    assert found.activations == image + 3 * convolved - 256 * (3 + 32) + 3 * pooled
    assert found.kernels == 3 * 9 * (3 * 32 + 32 * 64 + 64 * 128)


def run_plan(monkeypatch, made: ahead.Compiled, *flags):
    """Call the command; every program that it compiles is `made`."""
    arguments = ["plan", "--arch", "basic_cnn", "--image-size", str(SIZE), *map(str, flags)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(ahead.Plan, "compile", lambda self, batch_size=None: made)
    plan.main()


def test_the_command_writes_table_json_and_picture(float32, monkeypatch, tmp_path, capsys):
    flags = ("--target", "h100", "--batch-size", BATCH, "--no-largest-batch")
    outputs = ("--json", tmp_path / "plan.json", "--plot", tmp_path / "plan.png")
    run_plan(monkeypatch, float32, *flags, *outputs)
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document.keys() == {"targets", "config", "environment"}
    [row] = document["targets"]
    assert list(row) == [
        "target", "devices", "fits", "peak_bytes", "device_memory_bytes", "largest_batch",
        "flops_per_step", "bytes_per_step", "bound_images_per_second", "kernels", "collectives",
        "compile_seconds",
    ]  # fmt: skip
    assert row["target"] == "h100" and row["devices"] == 1 and row["fits"] is True
    assert row["bytes_per_step"] == float32.bytes and row["kernels"]["convolution"] == 8
    assert document["config"]["model"]["arch"] == "basic_cnn"
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "floor of bytes" in shown and "conv3" in shown and "bound" in shown


@pytest.mark.slow
def test_a_second_plan_says_nothing_of_the_compiler_and_its_cache(tmp_path):
    environ = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environ |= {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, ROOT / "scripts/plan.py", "--arch", "basic_cnn", "--target", "h100"]
    for _ in range(2):
        outcome = subprocess.run(command, env=environ, capture_output=True, text=True)
        assert not outcome.returncode, outcome.stderr
        assert not re.search(r"Warning|\.cc:", outcome.stderr), outcome.stderr


def test_a_program_that_does_not_fit_ends_the_command(float32, monkeypatch):
    over = float32.target.card.memory_bytes + 5_000_000_000
    monkeypatch.setattr(ahead, "largest_batch", lambda plan, first: 4096)
    wanted = "h100: the program does not fit, by 5.00 GB; the largest batch that fits is 4096"
    with pytest.raises(exits.CheckFailed, match=wanted):
        run_plan(monkeypatch, float32._replace(peak_bytes=over), "--target", "h100")
    with pytest.raises(exits.CheckFailed, match="says its compiler"):
        run_plan(monkeypatch, None, "--target", "h100")


def test_the_data_of_a_plan_are_those_of_the_flags_or_of_the_data_set():
    config, data = plan.of_flags(TrainConfig(model={"arch": "resnet50"}))
    assert (data, config.model.num_classes) == (ahead.Data((224, 224, 3), 0), 1000)
    config, data = plan.of_flags(TrainConfig(model={"arch": "resnet20"}))
    assert (data, config.model.num_classes) == (ahead.Data((32, 32, 3), 0), 10)
    config, data = plan.of_data(TrainConfig(model={"arch": "resnet18"}), evaluation=False)
    assert data.image_shape == (16, 16, 1) and data.resident > 1000  # the digits
    assert config.model.stem == "imagenet" and config.augment.random_crop == 2


def test_a_recipe_is_planned_at_the_sizes_that_it_trains_at():
    config = imagenet_recipes.IMAGENET_RECIPES["torchvision-resnet50-v2"].config
    for evaluation, side in ((False, 176), (True, 224)):
        _, data = plan.of_flags(config, evaluation=evaluation)
        assert data.image_shape == (side, side, 3)
    config, data = plan.of_flags(recipes.RECIPES["cifar10-fast"].config)
    assert data.image_shape == (32, 32, 3) and config.model.num_classes == 10
    gray = TrainConfig(data={"mean": (0.3,), "std": (0.2,)}, model={"arch": "resnet20"})
    assert plan.of_flags(gray)[1].image_shape == (32, 32, 1)


class TwoLayers(nnx.Module):
    def __init__(self, **options):
        self.conv = layers.conv(8, 16, 3, padding=1, rngs=nnx.Rngs(0), **options)
        self.fc = layers.linear(16, 8, rngs=nnx.Rngs(0), **options)

    def __call__(self, x):
        return self.fc(layers.global_average_pool(layers.relu(self.conv(x))))


def precisions(precision: str, dtype=None) -> dict[str, set[str]]:
    """{"convolution" or "dot": what the products of a network and its gradient ask for}."""
    graph, state = nnx.split(TwoLayers(precision=precision, dtype=dtype))
    leaves, tree = jax.tree.flatten(state)

    def loss(x, *leaves):
        return jnp.square(nnx.merge(graph, jax.tree.unflatten(tree, leaves))(x)).sum()

    shapes = [(4, 16, 16, 8), *(leaf.shape for leaf in leaves)]
    text = on_a_gpu(jax.grad(loss, range(len(shapes))), *shapes)
    asked = {"convolution": set(), "dot": set()}
    for computation in program.parse(text).computations.values():
        for i in computation.values():
            if program.is_product(i):
                kind = "dot" if i.opcode == "dot" or "cublas" in i.attributes else "convolution"
                found = re.search(r"operand_precision=\{(\w+),", i.attributes)
                asked[kind].add(found[1] if found else "default")
    return asked


@pytest.mark.parametrize(
    ("precision", "convolution", "dot"),
    [("default", "default", "highest"), ("tf32", "high", "high"), ("highest",) * 3],
)
def test_the_compiled_products_have_the_precision_asked_for(precision, convolution, dot):
    """XLA lets cuDNN and cuBLAS round the operands to TF32 up to "high". "default" is what
    PyTorch does on a GPU: TF32 in convolutions alone."""
    assert precisions(precision) == {"convolution": {convolution}, "dot": {dot}}


def test_what_is_not_float32_asks_for_no_precision():
    assert precisions("highest", jnp.bfloat16)["convolution"] == {"default"}


def test_pytorch_s_default_is_the_default():
    """The twin sets for each precision what PyTorch has: TF32 in convolutions alone at first."""
    fresh = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    found = {}
    for precision in ("tf32", "highest", "default"):
        configure_torch(TrainConfig(model={"precision": precision}))
        cudnn, cublas = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        found[precision] = (cudnn, cublas)
    torch.use_deterministic_algorithms(False)
    assert found == {"tf32": (True, True), "highest": (False, False), "default": (True, False)}
    assert found["default"] == fresh


@pytest.mark.parametrize(
    "target, dtype",
    [
        ("h100", "float32"),
        ("v5e", "bfloat16"),
        pytest.param("h100", "bfloat16", marks=pytest.mark.slow),
        pytest.param("v5e", "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_step_of_every_network_keeps_all_promises(arch, target, dtype):
    if target == "v5e":
        pytest.importorskip("libtpu")
    made = study.step(arch, target, dtype)
    assert not list(study.faults(made, arch, dtype))


@pytest.mark.control
def test_every_promise_can_be_broken(float32, bfloat16):
    """Each line that a program may be charged with, from programs that deserve it."""
    pooled = "%s = f32[96,8,8,8]{3,2,1,0} select-and-scatter(%x), metadata={}\nf64[2]"
    float32 = float32._replace(text=f"{float32.text}\n{pooled}")
    said = [
        *study.faults(float32, "resnet20", "bfloat16"),
        *study.faults(bfloat16, "resnet20", "float32"),
    ]
    wanted = ("convolutions of a network with 19", "convolutions of f32", "f64[", "in float32")
    wanted += ("select-and-scatter", "all-reduce on one device")
    for words in wanted:
        assert any(words in line for line in said), (words, said)
