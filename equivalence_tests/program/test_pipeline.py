"""Decoding, order, batches and statistics of the input pipeline."""

import subprocess
import sys
import threading
import tracemalloc
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

import torch_ref.prepare
from equivalence_tests.program.image_folder import encoded
from flax_resnet.commands import cli
from flax_resnet.config import DataConfig, TrainConfig
from flax_resnet.data import image_files, pipeline, prepare
from flax_resnet.data.image_files import BadImage
from flax_resnet.data.pipeline import BatchOrder, Decoder
from flax_resnet.data.sources import ArraySource, EncodedSource, Subset
from flax_resnet.errors import InputError


def picture(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def test_random_resized_crop_only_where_there_is_a_draw():
    decoder = Decoder(size=16, resize=16, random_resized_crop=True)
    image = picture(40, 60)
    rng = np.random.default_rng(0)
    first, second = decoder(image, rng), decoder(image, rng)
    assert first.shape == (16, 16, 3) and not (first == second).all()
    np.testing.assert_array_equal(decoder(image), Decoder(size=16, resize=16)(image))


@given(
    num_images=st.integers(1, 60),
    batch_size=st.integers(1, 60),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**31 - 1),
)
def test_an_epoch_is_a_permutation_without_its_remainder(num_images, batch_size, epochs, seed):
    if batch_size > num_images:
        return
    order = BatchOrder(num_images=num_images, batch_size=batch_size, seed=seed, epochs=epochs)
    steps = num_images // batch_size
    assert len(order) == steps * epochs
    for epoch in range(epochs):
        seen = np.concatenate([order[epoch * steps + step] for step in range(steps)])
        assert len(set(seen.tolist())) == len(seen) == steps * batch_size
        assert set(seen.tolist()) <= set(range(num_images))


def labelled(labels, names=("cat", "dog", "owl")):
    train = SimpleNamespace(labels=np.array(labels))
    return SimpleNamespace(train=train, splits={"train": train}, class_names=names)


def test_class_weights_are_balanced_or_of_a_file(tmp_path):
    weights = prepare.class_weights("balanced", labelled([0, 0, 0, 1, 1, 2]))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=[0, 0, 0, 1, 1, 2])
    np.testing.assert_allclose(weights, expected)
    path = tmp_path / "weights.json"
    path.write_text('{"owl": 3, "cat": 1, "dog": 0.5}')
    assert prepare.class_weights(str(path), labelled([0])).tolist() == [1, 0.5, 3]
    path.write_text('{"cafe\u0301": 2, "cat": 1}', encoding="utf-8-sig")
    weights = prepare.class_weights(str(path), labelled([0], ("caf\u00e9", "cat")))
    assert weights.tolist() == [2, 1]


@pytest.mark.parametrize(
    "text, word",
    [
        ('{"owl": 3, "cat": 1}', "dog is missing"),
        ('{"owl": 3, "cat": 1, "dog": 1, "bee": 1}', "bee is no class"),
        ('{"owl": 3, "cat": 1, "dog": -1}', "dog has no positive weight: -1"),
        ('{"owl": NaN, "cat": 1, "dog": 1}', "owl has no positive weight"),
        ("[1, 2, 3]", "no JSON object"),
        ("{", "Expecting"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"owl": 1%s, "cat": 1, "dog": 1}' % ("0" * 400), "owl has no positive weight"),
        ('{"owl": 3, "cat": 1, "dog": 1, "owl": 2}', "owl is given twice"),
        ('{"\u00e9": 3, "e\u0301": 1}', "\u00e9 is given twice"),
    ],
)
def test_a_file_of_class_weights_is_checked(text, word, tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(text)
    with pytest.raises(InputError, match=word):
        prepare.class_weights(str(path), labelled([0, 1, 2]))
    with pytest.raises(InputError, match=r"`class_weights` ~no-such-user/w\.json does not exist"):
        prepare.class_weights("~no-such-user/w.json", labelled([0, 1, 2]))
    with pytest.raises(InputError, match="owl has no training image"):
        prepare.class_weights("balanced", labelled([0, 1]))
    with pytest.raises(InputError, match="class owl has no training image"):
        torch_ref.prepare.class_weights("balanced", labelled([0, 1]))


def test_copies_are_decoded_apart():
    source = ArraySource(np.stack([picture(20, 20, seed=k) for k in range(4)]), np.arange(4))
    order = BatchOrder(num_images=4, batch_size=4, seed=0, epochs=1, repeats=2)
    decoder = Decoder(size=8, resize=8, random_resized_crop=True)
    batch = next(pipeline.image_iterator(source, decoder, order, num_workers=0))
    assert batch["label"].tolist() == (batch["index"] % 4).tolist()
    first, second = batch["image"][batch["label"] == batch["label"][0]]
    assert not (first == second).all()


def test_order_depends_on_seed_and_epoch():
    order = BatchOrder(num_images=50, batch_size=50, seed=0, epochs=2)
    other = BatchOrder(num_images=50, batch_size=50, seed=1, epochs=2)
    assert not (order[0] == order[1]).all() and not (order[0] == other[0]).all()


def test_the_iterator_goes_on_where_its_state_says():
    source = ArraySource(np.stack([picture(8, 8, seed=i) for i in range(20)]), np.arange(20))
    order = BatchOrder(num_images=20, batch_size=4, seed=0, epochs=2)
    decoder = Decoder(size=8, resize=8, random_resized_crop=True)

    def iterator():
        return pipeline.image_iterator(source, decoder, order, num_workers=0)

    whole = list(iterator())
    assert len(whole) == 10
    part = iterator()
    for _ in range(3):
        next(part)
    again = iterator()
    again.set_state(part.get_state())
    for expected, got in zip(whole[3:], again, strict=True):
        for name in ("image", "label", "index"):
            np.testing.assert_array_equal(expected[name], got[name])


@pytest.mark.parametrize("parts", [[slice(0, 2), slice(2, 4)], [slice(n, n + 1) for n in range(4)]])
def test_the_parts_of_all_processes_are_the_batch(parts):
    """This holds for random areas too: draws depend on step and image, not on the process."""
    source = ArraySource(np.stack([picture(8, 8, seed=i) for i in range(10)]), np.arange(10))
    decoder = Decoder(size=8, resize=8, random_resized_crop=True)

    def training(rows):
        order = BatchOrder(num_images=10, batch_size=4, seed=3, epochs=2, rows=rows)
        return pipeline.image_iterator(source, decoder, order, num_workers=0)

    def evaluation(rows):
        return pipeline.evaluation_batches(source, decoder, 4, rows=rows)

    for batches in (training, evaluation):
        everything = zip(batches(slice(None)), *map(batches, parts), strict=True)
        for whole, *each in everything:
            for name in whole:
                np.testing.assert_array_equal(np.concatenate([b[name] for b in each]), whole[name])


class Meeting:
    """A source that returns images only when several are requested at the same time."""

    def __init__(self, images, together):
        self.labels = np.arange(len(images))
        self._images, self._barrier = images, threading.Barrier(together)

    def __len__(self):
        return len(self._images)

    def __getitem__(self, number):
        self._barrier.wait(timeout=20)
        return self._images[number]


IMAGES = np.stack([picture(8, 8, seed=i) for i in range(16)])
DECODER = Decoder(size=8, resize=8)


def decoded_ahead(source):
    order = BatchOrder(num_images=16, batch_size=1, seed=0, epochs=1)
    batches = list(pipeline.image_iterator(source, DECODER, order, num_workers=0))
    return np.concatenate([b["image"] for b in sorted(batches, key=lambda b: b["index"][0])])


def decoded_at_once(source):
    return pipeline.decode_all(source, DECODER)


@pytest.mark.parametrize("decode", [decoded_ahead, decoded_at_once])
def test_images_are_decoded_in_parallel(decode):
    """Batches are decoded ahead of their step; cached images are decoded at once."""
    np.testing.assert_array_equal(decode(Meeting(IMAGES, 8)), IMAGES)


def test_images_lie_in_memory_once():
    """No second copy is made by decoding, or by computing statistics."""
    source = ArraySource(np.stack([picture(70, 70)] * 3000), np.zeros(3000, np.int32))
    decoder = Decoder(size=64, resize=64)
    tracemalloc.start()
    try:
        images = pipeline.decode_all(source, decoder)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * images.nbytes  # a list of all: 2
        tracemalloc.reset_peak()
        prepare._statistics(source, decoder, images)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * images.nbytes  # all at once: 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("most", [10**6, 300])
def test_statistics_do_not_depend_on_what_is_kept(monkeypatch, most):
    """Cached, read in parts or in `torch_ref`, statistics are equal, also of a limited number."""
    for module, values in (
        (prepare, {"_MEASURED": most, "_AT_ONCE": 128}),
        (torch_ref.prepare, {"_MEASURED": most}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    found = [
        prepare.prepare(cli.merge(TrainConfig(), {"data": {"cache": cache, "image_size": "8"}}))
        for cache in ("device", "none")
    ]
    assert "train" in found[0].images and not found[1].images
    assert found[0].config.data.mean == found[1].config.data.mean
    assert found[0].config.data.std == found[1].config.data.std
    twin = torch_ref.prepare.prepare(TrainConfig(data=DataConfig(image_size=8))).config.data
    np.testing.assert_allclose(twin.mean, found[0].config.data.mean, rtol=1e-12)
    np.testing.assert_allclose(twin.std, found[0].config.data.std, rtol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_those_of_the_pixels(channels):
    images = picture(40, 30, channels)[None]
    mean, std = pipeline.channel_statistics(pipeline.count_levels(images))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)


def test_a_constant_channel_has_no_standard_deviation():
    images = picture(40, 30)[None]
    images[..., 1] = 255
    with pytest.raises(InputError, match="constant; give `mean` and `std`"):
        pipeline.channel_statistics(pipeline.count_levels(images))


STATISTICS = """
import resource
import numpy as np
from torch_ref import pipeline, sources
from torchvision.transforms import v2

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB

image = np.random.default_rng(0).integers(0, 256, (112, 112, 3)).astype(np.uint8)
images = np.broadcast_to(image, (2000, *image.shape))
before = peak()
labels = np.zeros(len(images), int)
pipeline.channel_statistics(sources.Images(images, labels, v2.PILToTensor()))
print(peak() - before)
"""


def test_statistics_of_many_images_in_little_memory():
    """The twin's, which read one image after the other: none of them may leave memory behind."""
    command = [sys.executable, "-c", STATISTICS]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # An image kept as float64, as once was, takes 0.3 MiB, so all of them would take 570.
    assert grown < 200, f"2,000 images of 112 pixels took {grown} MiB"


class Asked:
    """A source that counts reads of all its labels."""

    names = None

    def __init__(self, length):
        self.length, self.times = length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        return np.zeros((2, 2, 1), np.uint8)

    @property
    def labels(self):
        self.times += 1
        return np.arange(self.length, dtype=np.int32)


def test_labels_are_looked_up_once_for_all_batches():
    """The cost of a batch does not grow with the number of images."""
    source, decoder = Asked(400), Decoder(size=2, resize=2)
    subset = Subset(source, np.arange(300)[::-1])
    order = BatchOrder(num_images=300, batch_size=4, seed=0, epochs=1)
    for batch in pipeline.image_iterator(subset, decoder, order, num_workers=0):
        np.testing.assert_array_equal(batch["label"], 299 - batch["index"])
    for images in (None, np.zeros((300, 2, 2, 1), np.uint8)):
        batches = pipeline.evaluation_batches(subset, decoder, 4, images)
        labels = np.concatenate([batch["label"] for batch in batches])
        np.testing.assert_array_equal(labels, np.arange(300)[::-1])
    assert source.times == 1


class SomeBad(Asked):
    """A source in which every third image is unreadable."""

    def __getitem__(self, number):
        if number % 3 == 0:
            raise BadImage(f"{number}: not a readable image (a test)")
        return super().__getitem__(number)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 40])
def test_evaluation_masks_images_that_cannot_be_read(batch_size):
    """With a list for left-out images they are masked; without one they are errors."""
    decoder, left_out = Decoder(size=2, resize=2), []
    batches = pipeline.evaluation_batches(SomeBad(20), decoder, batch_size, left_out=left_out)
    seen = [batch["label"][batch["mask"]] for batch in batches]
    assert np.concatenate(seen).tolist() == [n for n in range(20) if n % 3]
    assert [str(e).split(":")[0] for e in left_out] == [str(n) for n in range(0, 20, 3)]
    with pytest.raises(InputError, match="7 images cannot be read: 0: not"):
        list(pipeline.evaluation_batches(SomeBad(20), decoder, batch_size))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 16])
def test_evaluation_sees_every_image_once(batch_size):
    images = np.stack([picture(4, 4, seed=i) for i in range(10)])
    source = ArraySource(images, np.arange(10))
    decoder = Decoder(size=4, resize=4)
    for decoded in (images, None):
        batches = list(pipeline.evaluation_batches(source, decoder, batch_size, decoded))
        assert {len(batch["image"]) for batch in batches} == {batch_size}
        mask = np.concatenate([batch["mask"] for batch in batches])
        for name, expected in (("image", images), ("label", np.arange(10))):
            seen = np.concatenate([batch[name] for batch in batches])
            np.testing.assert_array_equal(seen[mask], expected)


@pytest.mark.parametrize(
    "model,data,expected",
    [
        ({"arch": "resnet18"}, {}, (16, "imagenet", 2)),
        ({"arch": "resnet18", "stem": "cifar"}, {}, (8, "cifar", 1)),
        ({"arch": "resnet20"}, {}, (8, None, 1)),
        ({"arch": "resnet18"}, {"image_size": "32"}, (32, "cifar", 4)),
        ({"arch": "resnet18"}, {"image_size": "64"}, (64, "imagenet", 8)),
    ],
)
def test_size_stem_and_crop_are_chosen(model, data, expected):
    config = prepare.prepare(cli.merge(TrainConfig(), {"model": model, "data": data})).config
    assert (config.data.image_size, config.model.stem, config.augment.random_crop) == expected


class Millions:
    """A source with more images than fit in any memory."""

    def __len__(self):
        return 10**9


def test_more_images_than_memory_are_refused_before_they_are_read():
    data = {"cache": "device", "image_size": "224"}
    config = cli.merge(TrainConfig(), {"data": data})
    dataset = SimpleNamespace(train=Millions(), validation=(), test=(), channels=3)
    with pytest.raises(InputError, match=r"140,190.1 GiB.*`cache` none"):
        prepare.that_fit(config, dataset)


def test_more_steps_than_a_run_can_count_are_refused():
    config = cli.merge(TrainConfig(), {"epochs": "100000", "batch_size": "1"})
    prepare._check_steps(config, 21_474)
    with pytest.raises(InputError, match=r"`epochs` 100,000 .* 2,147,500,000 steps"):
        prepare._check_steps(config, 21_475)


def limited(monkeypatch, size):
    """The limit on memory, which is `size` within the test."""
    budget = image_files._Budget(size)
    for module in (image_files, pipeline):
        monkeypatch.setattr(module, "MEMORY", budget)
    return budget


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_what_an_image_is_resized_to_counts(monkeypatch, kind):
    """An image of 4 x 40 pixels becomes one of 64 x 640: 256 times as many."""
    one = (4 * 40 + 64 * 640) * 16
    budget = limited(monkeypatch, 3 * one)
    used, resize = [], pipeline._resize

    def watched(*arguments):
        used.append(budget._used)
        return resize(*arguments)

    monkeypatch.setattr(pipeline, "_resize", watched)
    images, labels = np.zeros((64, 4, 40, 3), np.uint8), np.zeros(64, np.int32)
    files = [encoded(Image.fromarray(image), format="PNG") for image in images]
    sources = {"arrays": ArraySource(images, labels), "files": EncodedSource(files, labels, 3, "x")}
    decoder = Decoder(size=64, resize=64)
    assert pipeline.decode_all(sources[kind], decoder).shape == (64, 64, 64, 3)
    assert len(used) == 64 and all(u % one == 0 and one <= u <= 3 * one for u in used)
    assert budget._used == 0


def test_an_image_larger_than_the_limit_is_resized_alone(monkeypatch):
    budget = limited(monkeypatch, 1000)
    source = ArraySource(np.zeros((32, 2, 2, 3), np.uint8), np.zeros(32, np.int32))
    assert len(pipeline.decode_all(source, Decoder(size=32, resize=32))) == 32
    assert budget._used == 0


def test_worker_processes_share_the_limit(monkeypatch):
    budget = limited(monkeypatch, 1000)
    made = mock.Mock()
    monkeypatch.setattr(pipeline.workers, "InTurn", made)
    source = ArraySource(np.zeros((8, 9, 9, 3), np.uint8), np.arange(8))
    order = BatchOrder(num_images=8, batch_size=4, seed=0, epochs=2)
    decoder = Decoder(size=8, resize=8)
    pipeline.image_iterator(source, decoder, order, num_workers=4)
    make, count = made.call_args.args
    assert budget._total == 1000 and count == 4
    assert len(list(make(1))) == 1 and budget._total == 250
