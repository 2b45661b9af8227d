"""Weights by name: torchvision's, timm's and the Hub's, and URLs, from a server on this machine."""

import csv
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save
from torchvision.models import WeightsEnum
from torchvision.models._api import Weights
from torchvision.transforms._presets import ImageClassification

import flax_resnet
from equivalence_tests.program.command import ROOT, refused, run_script
from equivalence_tests.program.web import served
from flax_resnet.commands import train
from flax_resnet.config import DataConfig, TrainConfig
from flax_resnet.data.sources import open_dataset
from flax_resnet.errors import InputError
from flax_resnet.runs import views
from flax_resnet.training import fit
from flax_resnet.weights import published

CLASSES = ("tench", "goldfish", "white shark", "tiger shark", "hammerhead")

SMALL = ["--epochs", 1, "--batch-size", 4, "--devices", 1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=len(CLASSES)).eval()


@pytest.fixture(scope="module")
def content(net, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("net") / "net.pth"
    torch.save(net.state_dict(), path)
    return path.read_bytes()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server, empty caches, and libraries that ask it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with served() as site:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", site.url)  # as HF_ENDPOINT before the import
        template = "{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{site.url}/{template}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.utils._http.time", mock.Mock())  # no waiting
        yield site


@pytest.fixture
def resnet18(site, content, monkeypatch) -> str:
    """The URL of weights that torchvision names; it is on the server."""
    path = f"/models/resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    site.files[path] = content
    look = functools.partial(ImageClassification, crop_size=48, resize_size=56)

    class Published(WeightsEnum):
        IMAGENET1K_V1 = Weights(site.url + path, look, {"categories": list(CLASSES)})
        DEFAULT = IMAGENET1K_V1

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: Published)
    return site.url + path


@pytest.fixture
def timm(site, net) -> str:
    """The name of weights on the Hub, as timm publishes them."""
    looks = dict(input_size=[3, 48, 48], crop_pct=0.95, interpolation="bicubic")
    looks |= dict(mean=MEAN, std=STD)
    config = {"architecture": "resnet18", "pretrained_cfg": looks}
    site.publish("timm/resnet18.a1_in1k", "config.json", json.dumps(config).encode())
    site.publish("timm/resnet18.a1_in1k", "model.safetensors", save(net.state_dict()))
    return "timm:resnet18.a1_in1k"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of three classes of small pictures in three splits."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(12):
        for name in ("cat", "dog", "owl"):
            for split in ("train", "val", "test"):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
                image.save(folder / split / name / f"{number}.png")
    return folder


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def same_as(net, arrays: dict) -> bool:
    expected = net.state_dict()
    return arrays.keys() == expected.keys() and all(
        np.array_equal(arrays[name], expected[name]) for name in expected
    )


def test_torchvision_tells_arrays_classes_and_looks(site, resnet18, net, tmp_path):
    for _ in range(2):  # the second time from the cache of torch.hub
        weights = flax_resnet.pretrained("torchvision:resnet18")
        assert same_as(net, weights.arrays) and weights.class_names == CLASSES
    assert weights.model == {"arch": "resnet18", "stem": "imagenet", "shortcut": None}
    looks = dict(image_size=48, resize_size=56, interpolation="bilinear", mean=MEAN, std=STD)
    assert weights.data == looks
    name = resnet18.rpartition("/")[2]
    assert site.asked == [f"/models/{name}"]
    assert files_below(tmp_path) == [tmp_path / "torch/hub/checkpoints" / name]
    torch.hub.load_state_dict_from_url(resnet18, check_hash=True)  # torch finds the same file
    assert len(site.asked) == 1


def test_the_hub_is_the_one_of_hf_endpoint(site, timm, net, tmp_path):
    """In a process of its own, for huggingface_hub reads the variable when it is imported."""
    code = f"import flax_resnet; print(len(flax_resnet.pretrained({timm!r}).arrays))"
    variables = {"HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path / "home")}
    variables = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout.split()[-1]) == len(net.state_dict())
    assert any(path.startswith("/timm/resnet18.a1_in1k/") for path in site.asked), site.asked


def test_a_name_becomes_a_network_of_ones_own_classes_in_two_commands(
    resnet18, pictures, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    start = ["--init-from", "torchvision:resnet18", "--dataset", f"folder:{pictures}"]
    outcome = run_script("train.py", *start, "--run-dir", "run", *SMALL, "--freeze-backbone")
    assert outcome.status == 0, outcome.err
    assert "the head is new: 3 classes" in outcome.out and "warning: `mean`" not in outcome.out
    data = flax_resnet.load_run("run").config.data
    assert (data.image_size, data.resize_size, data.mean, data.std) == (48, 56, MEAN, STD)
    outcome = run_script("evaluate.py", "run")
    assert outcome.status == 0 and "test: 36 images" in outcome.out


def config_of(monkeypatch, *flags):
    """The config that `train.py FLAGS` makes."""
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags)])
    return train.new_config(train.parse())


def test_what_the_user_sets_wins(timm, pictures, monkeypatch):
    own = ["--image-size", 32, "--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5]
    config = config_of(monkeypatch, "--init-from", timm, *own)
    assert config.data.resize_size is None and config.data.image_size == 32
    assert config.data.interpolation == "bicubic" and config.data.mean == (0.5, 0.5, 0.5)
    said, model = [], flax_resnet.create_model("resnet18", num_classes=3)
    fit._fine_tune(model, config, ("a", "b", "c"), said.append)
    assert f"warning: `mean` of {timm} is 0.485 0.456 0.406, this run takes 0.5 0.5 0.5" in said
    config = config_of(monkeypatch, "--init-from", timm, "--recipe", "torchvision-resnet18-v1")
    assert config.data.resize_size == 256 and config.data.interpolation == "bilinear"


def test_network_and_looks_of_a_file_and_of_a_run(tmp_path, monkeypatch):
    """Both are known without --arch, and images are normalised as in their training."""
    arrays = flax_resnet.state_dict(flax_resnet.create_model("basic_cnn", num_classes=2))
    torch.save({n: torch.tensor(a) for n, a in arrays.items()}, tmp_path / "mine.pth")
    looks = ["--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.2, "--image-size", 32]
    flags = [tmp_path / "mine.pth", tmp_path / "run", "--class-names", "cat,dog", *looks]
    outcome = run_script("convert.py", *flags)
    assert outcome.status == 0, outcome.err
    config = config_of(monkeypatch, "--init-from", tmp_path / "mine.pth")
    assert config.model.arch == "basic_cnn" and config.data == TrainConfig().data
    config = config_of(monkeypatch, "--init-from", tmp_path / "run")
    assert config.model.arch == "basic_cnn" and config.data.mean == (0.5, 0.4, 0.3)
    assert config.data.image_size == 32
    config = config_of(monkeypatch, "--init-from", tmp_path / "run", "--arch", "resnet20")
    assert config.model.arch == "resnet20"


def test_names_are_taken_wherever_weights_are(resnet18, net, pictures, tmp_path):
    name = "torchvision:resnet18:IMAGENET1K_V1"
    outcome = run_script("convert.py", name, tmp_path / "out.safetensors")
    assert outcome.status == 0, outcome.err
    assert same_as(net, flax_resnet.pretrained(tmp_path / "out.safetensors").arrays)
    outcome = run_script("convert.py", name, tmp_path / "run")
    assert outcome.status == 0, outcome.err
    run = flax_resnet.load_run(tmp_path / "run")
    assert run.class_names == CLASSES and run.config.data.resize_size == 56
    picture = pictures / "test/owl/0.png"
    outcome = run_script("predict.py", name, picture, "--json", tmp_path / "p.json")
    assert outcome.status == 0, outcome.err
    [row] = json.loads((tmp_path / "p.json").read_text())
    looks = ImageClassification(crop_size=48, resize_size=56)
    with torch.no_grad(), Image.open(picture) as image:
        expected = net(looks(image)[None]).softmax(1)[0].sort(descending=True)
    assert [p["class"] for p in row["predictions"]] == [CLASSES[i] for i in expected.indices]
    got = [p["probability"] for p in row["predictions"]]
    np.testing.assert_allclose(got, expected.values, atol=1e-2)  # a level of the resize
    refused(run_script("evaluate.py", name, "--dataset", f"folder:{pictures}"), "has the classes")
    refused(run_script("evaluate.py", name), "has no data of its own")


def test_folders_of_numbers_are_in_the_order_of_the_published_classes(timm, tmp_path):
    image = Image.fromarray(np.zeros((48, 48, 3), np.uint8))
    for number in range(5):
        (tmp_path / "set" / f"n{number}").mkdir(parents=True)
        for name in "abcd":
            image.save(tmp_path / "set" / f"n{number}" / f"{name}.png")
    flags = ["--dataset", f"folder:{tmp_path / 'set'}", "--split", "all"]
    outcome = run_script("evaluate.py", timm, *flags, "--predictions", tmp_path / "rows.csv")
    assert outcome.status == 0, outcome.err
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(rows) == 20 and {row["label"] for row in rows} == {f"n{n}" for n in range(5)}
    assert len({row["prediction"] for row in rows}) == 1  # the images are all the same


def test_the_hub_tells_looks_of_timm_and_of_transformers(site, timm, net):
    weights = flax_resnet.pretrained(timm)
    assert same_as(net, weights.arrays) and weights.class_names == ()
    assert weights.data["resize_size"] == 50 and weights.data["interpolation"] == "bicubic"
    images = dict(image_mean=MEAN, image_std=STD, size={"shortest_edge": 56}, crop_pct=0.875)
    labels = {str(number): name for number, name in enumerate(CLASSES)}
    images = json.dumps(images | {"resample": 3}).encode()
    site.publish("lab/net", "preprocessor_config.json", images)
    site.publish("lab/net", "config.json", json.dumps({"id2label": labels}).encode())
    site.publish("lab/net", "model.safetensors", save(net.state_dict()))
    weights = flax_resnet.pretrained("hf:lab/net")
    assert weights.class_names == CLASSES and weights.data["mean"] == MEAN
    assert (weights.data["image_size"], weights.data["resize_size"]) == (56, 64)


LOOKS = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 56}}


@pytest.mark.parametrize(
    ("looks", "sizes"),
    [
        ({}, (56, 56)),
        ({"size": 56, "crop_size": {"height": 48, "width": 48}}, (48, 56)),
        ({"crop_size": 48, "do_center_crop": False}, (56, 56)),
        ({"size": {"height": 48, "width": 48}}, "lose their proportions"),
        ({"size": {"shortest_edge": 384}, "crop_pct": 1.0}, "lose their proportions"),
        ({"do_rescale": False}, "rescaled"),
        ({"do_normalize": False}, "normalised"),
    ],
)
def test_how_transformers_cuts_images_is_read_or_refused(looks, sizes, site):
    site.publish("lab/net", "preprocessor_config.json", json.dumps(LOOKS | looks).encode())
    site.publish("lab/net", "config.json", b"{}")
    site.publish("lab/net", "model.safetensors", b"weights")
    if isinstance(sizes, str):
        with pytest.raises(InputError, match=sizes):
            published.find("hf:lab/net", print)
    else:
        data = published.find("hf:lab/net", print).data
        assert (data["image_size"], data["resize_size"]) == sizes


def test_another_network_of_the_same_names_and_shapes_is_refused(site):
    """timm's resnetaa50 has the weights of a resnet50, and average pooling instead of strides."""
    usual = dict(architecture="resnet18", hidden_act="relu", downsample_in_bottleneck=False)
    others = dict(architecture="resnetaa50", global_pool="max", hidden_act="gelu")
    others |= dict(downsample_in_first_stage=True, downsample_in_bottleneck=True)
    others |= dict(model_args={"act_layer": "silu"})
    configs = {key: usual | {key: value} for key, value in others.items()}
    for name, config in {"usual": usual, **configs}.items():
        site.publish(f"lab/{name}", "config.json", json.dumps(config).encode())
        site.publish(f"lab/{name}", "model.safetensors", b"weights")
    assert published.find("hf:lab/usual", print).path.read_bytes() == b"weights"
    for key in others:
        with pytest.raises(InputError, match=f"hf:lab/{key}: its {key} .* no network here"):
            published.find(f"hf:lab/{key}", print)


def test_the_default_weights_of_timm_are_taken_without_a_tag(site, timm):
    assert flax_resnet.pretrained("timm:resnet18").arrays
    with pytest.raises(InputError, match="timm:resnet19: timm has no weights of this name"):
        flax_resnet.pretrained("timm:resnet19")


def test_class_names_are_recorded_only_where_they_fit(site, net):
    site.publish("lab/net", "config.json", b'{"label_names": ["a", "b"]}')
    site.publish("lab/net", "model.safetensors", save(net.state_dict()))
    weights = flax_resnet.pretrained("hf:lab/net")
    assert weights.class_names == () and weights.data == {}
    outcome = run_script("predict.py", "hf:lab/net", __file__)
    refused(outcome, "nothing tells how", "convert hf:lab/net")


@pytest.mark.parametrize("script", ["predict.py", "evaluate.py"])
def test_what_was_taken_is_said_beside_the_results(site, timm, pictures, net, script):
    """The file holds an average beside the weights, under keys of their own."""
    views.warn.cache_clear()
    state = net.state_dict().items()
    state = {f"{key}.{name}": value.clone() for name, value in state for key in ("net", "ema")}
    site.publish("timm/resnet18.a1_in1k", "model.safetensors", save(state))
    data = {"predict.py": [pictures / "test/owl/0.png"]}
    data = data.get(script, ["--dataset", f"folder:{pictures}"])
    outcome = run_script(script, timm, *data)
    assert "model.safetensors: " in outcome.err and "ema" in outcome.err
    assert "model.safetensors" not in outcome.out


def test_without_a_home_no_folder_is_made(site, monkeypatch, tmp_path):
    """Libraries leave `~` in a path where they do not know the home; it would become a folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("TORCH_HOME", "XDG_CACHE_HOME", "HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=KeyError))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    for source, variable in (
        (f"{site.url}/net.pth", "TORCH_HOME"),
        ("timm:resnet18.a1_in1k", "HF_HOME"),
    ):
        with pytest.raises(InputError, match=f"{source}: there is no home.*set {variable}"):
            flax_resnet.pretrained(source)
    with pytest.raises(InputError, match="tfds:mnist: there is no home.*set TFDS_DATA_DIR"):
        open_dataset(DataConfig(dataset="tfds:mnist"))
    assert not list(tmp_path.glob("~*"))


def test_class_names_are_in_one_form_of_unicode(site, net):
    config = {"id2label": {"0": "cafe\u0301", "1": "tea"}}
    site.publish("a/drinks", "config.json", json.dumps(config).encode())
    site.publish("a/drinks", "model.safetensors", save(net.state_dict()))
    assert published.find("hf:a/drinks", say=print).class_names == ("café", "tea")


def test_urls_of_the_same_file_name_are_kept_apart(site, content, net, tmp_path):
    site.files["/one/net.pth"], other = content, torchvision.models.resnet18(num_classes=2)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    site.files["/two/net.pth"] = (tmp_path / "other.pth").read_bytes()
    assert same_as(net, flax_resnet.pretrained(f"{site.url}/one/net.pth").arrays)
    assert same_as(other, flax_resnet.pretrained(f"{site.url}/two/net.pth").arrays)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("cut", "cut off after"),
        ("flipped", "damaged on its way, its name says SHA-256"),
        ("html", "the server answers with a web page"),
        ("gone", "the server answers 404"),
    ],
)
def test_a_broken_download_leaves_nothing(site, resnet18, tmp_path, kind, words):
    site.kind = kind
    if kind == "gone":
        site.files.clear()
    outcome = run_script("convert.py", "torchvision:resnet18", tmp_path / "out.pth")
    refused(outcome, words, resnet18)
    assert files_below(tmp_path) == []


def test_a_damaged_file_in_a_cache_is_named(resnet18, timm, tmp_path):
    for name in ("torchvision:resnet18", timm):
        flax_resnet.pretrained(name)
    [kept] = (tmp_path / "torch").rglob("*.pth")
    [blob] = [p for p in files_below(tmp_path / "hub/models--timm--resnet18.a1_in1k/blobs")
              if p.stat().st_size > 9999]  # fmt: skip
    for name, path in (("torchvision:resnet18", kept), (timm, blob)):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        refused(run_script("convert.py", name, tmp_path / "out.pth"), "damaged", f"delete {path}")


def test_without_a_network_the_cache_is_taken(site, resnet18, timm, net, tmp_path, monkeypatch):
    flax_resnet.pretrained(timm)
    site.shutdown()
    site.server_close()
    assert same_as(net, flax_resnet.pretrained(timm).arrays)
    outcome = run_script("convert.py", "torchvision:resnet18", tmp_path / "out.pth")
    refused(outcome, "there is no connection", str(tmp_path / "torch"))
    outcome = run_script("convert.py", "timm:resnet34.a1_in1k", tmp_path / "out.pth")
    refused(outcome, "is not in", "it gives no answer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    outcome = run_script("convert.py", "hf:lab/net", tmp_path / "out.pth")
    refused(outcome, "HF_HUB_OFFLINE is set")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("file", ["answer", "model.safetensors", "config.json"])
def test_a_hub_that_answers_with_html(site, timm, tmp_path, file):
    if file == "answer":
        site.kind = "html"
    else:
        site.publish("timm/resnet18.a1_in1k", file, b"<!DOCTYPE html><title>Sign in</title>" * 9)
    words = {"answer": "not", "model.safetensors": "a web page", "config.json": "no JSON object"}
    outcome = run_script("convert.py", timm, tmp_path / "out.pth")
    refused(outcome, words[file])


@pytest.mark.parametrize(
    "name, words",
    [
        ("torchvision:resnet81", "unknown network 'resnet81'; did you mean 'resnet18'?"),
        ("torchvision:vgg16", "unknown network 'vgg16'"),
        ("torchvision:resnet18:IMAGENET1K_V9", "did you mean 'IMAGENET1K_V1'?"),
        ("hf:nobody/nothing", "no such repository"),
        ("hf:net", "OWNER/REPO"),
        ("hf:lab/empty", "none of the files model.safetensors"),
        ("https://", "names no file"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("https://[x]/net.pth", "IPv6"),
        ("hf:../..", "OWNER/REPO"),
        ("hf:lab/.net", "OWNER/REPO"),
    ],
)
def test_a_wrong_name_is_one_line(site, resnet18, tmp_path, name, words):
    site.publish("lab/empty", "config.json", b"{}")
    refused(run_script("convert.py", name, tmp_path / "out.pth"), words, name)


def test_a_password_in_a_url_is_refused_and_not_repeated(pictures, tmp_path):
    flags = ["--dataset", f"folder:{pictures}", "--run-dir", tmp_path / "run"]
    url = "https://ann:secret@127.0.0.1/net.pth"
    outcome = run_script("train.py", *flags, "--init-from", url)
    refused(outcome, "127.0.0.1: a URL here has no name and no password")
    assert "secret" not in outcome.err + outcome.out and not (tmp_path / "run").exists()


def test_weights_of_another_architecture_by_name(resnet18, pictures, tmp_path):
    flags = ["--init-from", "torchvision:resnet18", "--dataset", f"folder:{pictures}", *SMALL]
    outcome = run_script("train.py", *flags, "--arch", "resnet34", "--run-dir", tmp_path / "run")
    refused(outcome, "torchvision:resnet18: weights do not fit", "nearest architecture is resnet18")
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_missing_is_named_with_its_installation(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(published.importlib, "import_module", missing)
    for name, says in (
        ("torchvision:resnet18", r"needs torchvision, .* `pip install '\.\[torch\]'`"),
        ("hf:a/b", r"needs huggingface_hub, .* `pip install '\.\[hub\]'`"),
        ("timm:resnet18", "needs timm: `pip install timm`"),
    ):
        with pytest.raises(InputError, match=says):
            published.find(name, print)
