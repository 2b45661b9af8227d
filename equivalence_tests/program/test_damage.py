"""Damaged checkpoints, images and configs.

A checkpoint with any kind of damage in any file is skipped with a message, and the one before it is
used. Broken images and settings are errors of one line, never tracebacks.
"""

import errno
import functools
import io
import json
import os
import random
import shutil

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from equivalence_tests.studies import edges
from flax_resnet import list_models
from flax_resnet.commands import cli
from flax_resnet.config import TrainConfig, config_from_file, from_dict, to_dict
from flax_resnet.data.image_files import decode_image
from flax_resnet.errors import InputError
from flax_resnet.runs import checkpoint
from flax_resnet.runs.checkpoint import Checkpoints, steps_in

DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit flipped": lambda path: path.write_bytes(_flipped(path.read_bytes())),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def state(value):
    return {"a": jnp.full((50, 40), value), "b": {"c": jnp.arange(7.0) * value}}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Checkpoints of steps 1 and 2; every leaf holds the number of its step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, state(float(step)), {"step": step}, improvement=False)
    checkpoints.close()
    return folder


def reopened(folder):
    """(newest sound step, its state, messages)."""
    said = []
    checkpoints = Checkpoints(folder, say=said.append)
    step = checkpoints.latest()
    restored = None if step is None else checkpoints.restore(step, state(0.0))
    checkpoints.close()
    return step, restored, said


def test_undamaged_the_newest_is_used(two_steps):
    step, restored, said = reopened(two_steps)
    assert (step, said) == (2, []) and (restored["a"] == 2).all()


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_noticed(two_steps, tmp_path, damage, caplog):
    files = sorted(p.relative_to(two_steps) for p in (two_steps / "2").rglob("*") if p.is_file())
    assert len(files) > 5
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        if not (folder / name).stat().st_size:
            continue  # an empty file can only be deleted, which is tested below
        DAMAGES[damage](folder / name)
        step, restored, said = reopened(folder)
        assert step == 1, (name, said)
        assert (restored["a"] == 1).all() and (restored["b"]["c"] == np.arange(7)).all()
        assert len(said) == 1 and "step 2" in said[0], said
        manifest = name.name.startswith("manifest")
        assert manifest or name.name in said[0], said
    assert not caplog.records  # Orbax logs some damage itself


@pytest.mark.parametrize(
    "content", [b"null", b"{}", b"[]", b"7", b'{"a": 1}', b"\xff", b"[" * 10**5]
)
def test_a_manifest_that_lists_nothing_is_damaged(two_steps, tmp_path, content):
    shutil.copytree(two_steps, tmp_path / "run")
    (tmp_path / "run/2/manifest.json").write_bytes(content)
    step, restored, said = reopened(tmp_path / "run")
    assert step == 1 and (restored["a"] == 1).all()
    assert len(said) == 1 and "step 2" in said[0]


def listed_less(step):
    """Remove one of the files from the manifest."""
    names = json.loads((step / "manifest.json").read_text())
    del names["state/manifest.ocdbt"]
    (step / "manifest.json").write_text(json.dumps(names))


@pytest.mark.parametrize("change", [
    listed_less,
    lambda step: (step / "state" / "d" / "more").write_bytes(b"x"),
    lambda step: (step / "more").write_bytes(b""),
])  # fmt: skip
def test_a_file_that_the_manifest_does_not_know_is_damage(two_steps, tmp_path, change):
    shutil.copytree(two_steps, tmp_path / "run")
    change(tmp_path / "run/2")
    step, _, said = reopened(tmp_path / "run")
    assert step == 1 and "does not belong to it" in said[0]


def test_an_unreadable_checkpoint_is_passed_over(two_steps, monkeypatch):
    """Reading raises an error of the disk."""
    original = checkpoint.sha256

    def broken(path):
        if path.is_relative_to(two_steps / "2" / "state"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path)

    monkeypatch.setattr(checkpoint, "sha256", broken)
    step, _, said = reopened(two_steps)
    assert step == 1 and len(said) == 1
    assert "step 2" in said[0] and "Input/output error" in said[0]


@pytest.mark.parametrize("name", ["²", "٣", "7", "08", "-1", "7.5", "7 "])
def test_other_names_among_the_checkpoints_are_no_steps(two_steps, tmp_path, name):
    """A resumed run does not delete them."""
    shutil.copytree(two_steps, tmp_path / "run")
    mine = tmp_path / "run" / name / "photo.jpg"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert steps_in(tmp_path / "run") == [1, 2]
    assert reopened(tmp_path / "run")[0] == 2
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.delete_after(1)
    checkpoints.save(3, state(3.0), {}, improvement=False)
    checkpoints.close()
    assert steps_in(tmp_path / "run") == [1, 3] and mine.read_text() == "mine"


@pytest.mark.parametrize("name, words", [
    ("5", "step 5 passed over: it was written as that of step 1"),
    ("01", "01 passed over: a checkpoint is named by its step"),
    ("1 (copy)", "1 (copy) passed over: a checkpoint is named by its step"),
])  # fmt: skip
def test_a_copied_or_renamed_checkpoint_is_none_and_is_named(two_steps, tmp_path, name, words):
    shutil.copytree(two_steps, tmp_path / "run")
    shutil.move(tmp_path / "run/1", tmp_path / "run" / name)
    step, restored, said = reopened(tmp_path / "run")
    assert step == 2 and (restored["a"] == 2).all()
    assert len(said) == 1 and words in said[0]


def test_a_checkpoint_of_an_earlier_version_does_not_know_its_step(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    document = tmp_path / "run/2/document/metadata"
    document.write_text("{}")
    checkpoint._write_manifest(tmp_path / "run/2")
    assert reopened(tmp_path / "run")[::2] == (2, [])


def test_a_link_to_a_checkpoint_is_deleted_and_the_checkpoint_is_not(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "other")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/2").symlink_to(tmp_path / "other/2")
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest() == 2
    checkpoints.delete_after(None)
    checkpoints.save(2, state(5.0), {}, improvement=False)
    assert (checkpoints.restore(2, state(0.0))["a"] == 5).all()
    checkpoints.close()
    assert reopened(tmp_path / "other")[::2] == (2, [])


def test_a_foreign_folder_is_no_checkpoint_and_stays(tmp_path):
    mine = tmp_path / "7" / "photo.jpg"
    mine.parent.mkdir()
    mine.write_text("mine")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError, match="7 has the name of a checkpoint"):
        checkpoints.save(7, state(7.0), {}, improvement=False)
    checkpoints.close()
    assert mine.exists()


def test_what_is_not_of_a_checkpoint_is_not_deleted_with_it(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    mine = [tmp_path / f"run/{step}/photo.jpg" for step in (1, 2)]
    for path in mine:
        path.write_text("mine")
    checkpoints = Checkpoints(tmp_path / "run", say=lambda line: None)
    with pytest.raises(InputError, match="photo.jpg"):
        checkpoints.delete_after(None)
    mine[1].unlink()
    for step in (3, 4, 5):
        checkpoints.save(step, state(step), {}, improvement=False)
    checkpoints.close()
    assert steps_in(tmp_path / "run") == [1, 4, 5] and mine[0].exists()


def test_without_a_sound_checkpoint_there_is_none(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "all")
    for path in (tmp_path / "all").rglob("*"):
        if path.is_file() and path.stat().st_size:
            DAMAGES["one bit flipped"](path)
    step, _, said = reopened(tmp_path / "all")
    assert step is None and len(said) == 2


def test_the_latest_two_and_the_best_are_kept_however_often_a_run_goes_on(tmp_path):
    kept = []
    for first in (1, 4, 7):
        checkpoints = Checkpoints(tmp_path)
        for step in range(first, first + 3):
            best = step == 2
            checkpoints.save(step, state(step), {"improvement": best}, improvement=best)
        checkpoints.close()
        kept.append(steps_in(tmp_path))
    assert kept == [[2, 3], [2, 5, 6], [2, 8, 9]]


def test_a_damaged_step_is_written_again(two_steps, tmp_path):
    """A resumed run that reaches the step again replaces it."""
    shutil.copytree(two_steps, tmp_path / "run")
    (tmp_path / "run/2/manifest.json").unlink()
    checkpoints = Checkpoints(tmp_path / "run", say=lambda line: None)
    checkpoints.delete_after(checkpoints.latest())
    checkpoints.save(2, state(3.0), {"step": 2}, improvement=False)
    checkpoints.close()
    step, restored, said = reopened(tmp_path / "run")
    assert (step, said) == (2, []) and (restored["a"] == 3).all()


def test_a_step_found_to_be_the_best_is_marked_so(two_steps, tmp_path):
    """The step may have been saved earlier, when the run was stopped there."""
    shutil.copytree(two_steps, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(2, state(2.0), {"improvement": True}, improvement=True)
    checkpoints.save(3, state(3.0), {"improvement": False}, improvement=False)
    checkpoints.save(3, state(4.0), {"improvement": False}, improvement=False)
    assert (checkpoints.best(), checkpoints.latest()) == (2, 3)
    assert (checkpoints.restore(3, state(0.0))["a"] == 3).all()
    checkpoints.close()


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
NUM_IMAGES = 10_000


def picture(kind: str, rng) -> bytes:
    file = io.BytesIO()
    pixels = np.array([[rng.randrange(256) for _ in range(12)] for _ in range(9)], np.uint8)
    Image.fromarray(pixels).convert("RGB").save(file, kind)
    return file.getvalue()


def spoiled(content: bytes, rng) -> bytes:
    """The content with some bytes changed, removed or inserted."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 8)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.3:
        del content[rng.randrange(1, len(content)) :]
    if rng.random() < 0.2:
        content[rng.randrange(len(content)) :] = rng.randbytes(rng.randrange(40))
    return bytes(content)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_ten_thousand_spoiled_images():
    """Each image is decoded or refused in one line; no other error is raised."""
    rng, refused = random.Random(0), 0
    originals = [picture(kind, rng) for kind in FORMATS]
    for number in range(NUM_IMAGES):
        file = io.BytesIO(spoiled(rng.choice(originals), rng))
        try:
            image = decode_image(file, rng.choice((1, 3)), name=f"{number}.jpg")
            assert image.dtype == np.uint8 and image.ndim == 3
        except InputError as error:
            refused += 1
            assert str(error).startswith(f"{number}.jpg: ") and "\n" not in str(error)
    assert 1000 < refused < 9900


ODD = [None, True, False, 0, 1, -1, 10**12, -(10**12), 0.5, float("nan"), float("inf"), 1e-320, "",
       "résumé\n", "auto", "sgd", "../..", [], [1, 2], {}, {"x": 1}]  # fmt: skip


def odd_config(rng) -> dict:
    """The default config with some odd values, and sometimes an unknown field."""
    values = to_dict(TrainConfig())
    for _ in range(rng.randrange(1, 5)):
        group = rng.choice([values, *(v for v in values.values() if isinstance(v, dict))])
        name = rng.choice([*group, "unknown"]) if group else "unknown"
        group[name] = rng.choice(ODD)
    return values


def from_odd_file(rng) -> TrainConfig:
    return from_dict(odd_config(rng))


@functools.cache
def all_flags() -> cli.Parser:
    parser = cli.Parser()
    cli.add_config_flags(parser)
    return parser


def from_odd_flags(rng) -> TrainConfig:
    parser = all_flags()
    flags = sorted(set(parser._option_string_actions) - {"-h", "--help"})
    argv = [
        w for _ in range(rng.randrange(1, 5)) for w in (rng.choice(flags), str(rng.choice(ODD)))
    ]
    return cli.merge(TrainConfig(), cli.requested_values(parser.parse_args(argv)))


@pytest.mark.parametrize("read, times", [(from_odd_file, 1000), (from_odd_flags, 1000)])
def test_a_thousand_odd_configs(read, times):
    """Each config is accepted or refused in one line."""
    rng, refused = random.Random(1), 0
    for _ in range(times):
        try:
            assert isinstance(read(rng), TrainConfig)
        except InputError as error:
            refused += 1
            assert str(error)
    assert 0.3 * times < refused < times


@pytest.mark.parametrize("text", ["[" * 10**5, '{"data":' * 900 + "1" + "}" * 900, "1" * 10**4])
def test_a_config_of_any_depth_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json"):
        config_from_file(tmp_path / "config.json")


@pytest.mark.parametrize("text, words", [
    ('{"epochs": 3, "epochs": 4}', "epochs is given twice"),
    ('{"schedule": {"milestones": []}}', "`milestones`: at least one"),
    ('{"optimizer": {"lr": 1, "lr": 1}}', "lr is given twice"),
    (r'{"data": {"dataset": "folder:\udce9"}}', r"folder:\udce9' is not in UTF-8"),
    (r'{"init_from": "\ud800"}', r"\ud800' is not in UTF-8"),
    (r'{"init_from": "a\u0000b"}', "`init_from`: the name is not in UTF-8 or holds a NUL"),
])  # fmt: skip
def test_a_config_says_each_thing_once_and_in_text(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as error:
        config_from_file(tmp_path / "config.json")
    assert words in str(error.value) and str(error.value).isprintable()


def test_a_device_file_is_refused_as_config(tmp_path):
    """/dev/zero would be read until the memory is full, a pipe waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no file"):
        config_from_file(tmp_path / "pipe")
    with pytest.raises(InputError, match="/dev/zero is no file"):
        config_from_file("/dev/zero")


@hypothesis.given(
    arch=st.sampled_from(list_models()),
    epochs=st.integers(1, 100_000),
    lr=st.floats(1e-30, 1e30),
    mixup=st.just(0.0) | st.floats(1e-30, 1e30),
    milestones=st.sets(st.integers(1, 10**5), min_size=1, max_size=5).map(sorted),
    std=st.lists(st.floats(1e-9, 1), min_size=1, max_size=4),
    folder=st.text(st.characters(exclude_characters="\0"), min_size=1),
)
def test_any_config_comes_back_from_json(arch, epochs, lr, mixup, milestones, std, folder):
    """Every digit of every number and any path are kept."""
    values = to_dict(TrainConfig()) | {"epochs": epochs}
    values["model"] |= {"arch": arch}
    values["optimizer"] |= {"lr": lr}
    values["augment"] |= {"mixup": mixup}
    values["schedule"] |= {"milestones": milestones}
    values["data"] |= {"mean": std, "std": std, "dataset": f"folder:{folder}"}
    config = from_dict(values)
    assert to_dict(config) == values
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_configs_at_the_edges_of_the_schema_are_traced():
    """`python -m equivalence_tests.studies.edges` is the long version with 2,000 configs."""
    found = edges.survey(8, seed=0)
    assert not found["faults"] and found["traced"] > 0, found


def test_an_average_after_a_warm_up_of_more_steps_than_int32_is_traced():
    config = cli.merge(TrainConfig(), {
        "model": {"arch": "basic_cnn", "num_classes": 10}, "epochs": 1,
        "schedule": {"warmup_epochs": 99_999.0}, "optimizer": {"ema_decay": 0.9},
    })  # fmt: skip
    edges.trace(config, 40_000)


def test_rates_whose_ratio_overflows_are_refused():
    with pytest.raises(InputError, match="--head-lr is at most 1e.30 times --lr"):
        cli.merge(TrainConfig(), {"optimizer": {"lr": 1e-30, "head_lr": 2.0}})


@pytest.mark.control
@pytest.mark.parametrize(
    "group,name,value",
    [("optimizer", "lr", 1e300), ("optimizer", "eps", 1e-50), ("optimizer", "beta2", 1 - 1e-12)],
)
def test_a_value_beyond_the_edge_is_noticed(group, name, value):
    """Negative control: the schema allows a value that a step cannot compute with."""
    values = {
        "model": {"arch": "basic_cnn", "num_classes": "10"},
        "optimizer": {"optimizer": "adam"},
    }
    config = cli.merge(TrainConfig(), values)
    object.__setattr__(getattr(config, group), name, value)
    with pytest.raises(ArithmeticError):
        edges._check_values(config, 3)


def test_a_step_saved_before_its_epoch_ended_is_saved_again(two_steps, tmp_path):
    """The run was stopped at the last step of an epoch, whose validation came after that."""
    shutil.copytree(two_steps, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    for epoch in (0, 1):
        checkpoints.save(3, state(3.0), {"progress": {"epoch": epoch}}, improvement=False)
    assert checkpoints.document(3)["progress"] == {"epoch": 1}
    checkpoints.close()
