"""Splits are disjoint, complete, stratified and limited; impossible ones are refused."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from sklearn.datasets import load_digits

from flax_resnet.config import DataConfig
from flax_resnet.data import cuts, sources
from flax_resnet.data.sources import ArraySource, open_dataset
from flax_resnet.errors import InputError


def test_digits_are_split_reproducibly():
    opened = open_dataset(DataConfig())
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [1293, 144, 360]
    assert opened.channels == 1 and opened.class_names == tuple("0123456789")
    whole, original = opened.train.source.source, load_digits()
    np.testing.assert_array_equal(
        np.stack([whole[i] for i in range(9)])[..., 0], np.round(original.images[:9] / 16 * 255)
    )
    np.testing.assert_array_equal(whole.labels, original.target)
    one, two = (open_dataset(DataConfig(split_seed=seed)).test.indices for seed in (0, 1))
    np.testing.assert_array_equal(one, opened.test.indices)
    assert (one != two).any()


def opened_labels(monkeypatch, labels, **fields):
    """`open_dataset` on images whose pixels hold their own number."""
    labels = np.asarray(labels, np.int32)
    source = ArraySource(np.arange(len(labels))[:, None, None, None], labels)
    facts = {"class_names": ("a", "b", "c"), "channels": 1}
    monkeypatch.setattr(sources, "_digits", lambda *_: ({"train": source}, facts))
    return open_dataset(DataConfig(**fields))


@hypothesis.settings(
    max_examples=60,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
@hypothesis.given(
    sizes=st.lists(st.integers(8, 60), min_size=2, max_size=6),
    test=st.floats(0.25, 0.5),
    validation=st.floats(0.25, 0.5),
    used=st.floats(0.5, 0.7),
    seed=st.integers(0, 99),
)
def test_splits_are_stratified(monkeypatch, sizes, test, validation, used, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    fields = dict(test_fraction=test, validation_fraction=validation, split_seed=seed)
    whole = opened_labels(monkeypatch, labels, **fields)
    members = [
        [int(s[index].item()) for index in range(len(s))]
        for s in (whole.train, whole.validation, whole.test)
    ]
    assert sorted(sum(members, [])) == list(range(len(labels)))  # disjoint and complete
    for split, own in zip((whole.train, whole.validation, whole.test), members, strict=True):
        np.testing.assert_array_equal(split.labels, labels[own])

    total = np.bincount(labels)
    rest = total - np.bincount(whole.test.labels, minlength=len(total))
    within_one(whole.test, total)
    within_one(whole.validation, rest)
    number = max(len(sizes), int(used * len(whole.train)))
    few = opened_labels(monkeypatch, labels, train_images=number, **fields)
    assert len(few.train) == number and set(few.train.names or ()) == set()
    within_one(few.train, np.bincount(whole.train.labels))
    assert {few.train[i].item() for i in range(number)} <= set(members[0])


def within_one(split, counts):
    share = counts * len(split) / counts.sum()
    assert np.abs(np.bincount(split.labels, minlength=len(counts)) - share).max() <= 1


def test_held_out_splits_may_be_empty(monkeypatch):
    opened = opened_labels(monkeypatch, [0, 1, 2] * 9, validation_fraction=0, test_fraction=0)
    assert len(opened.train) == 27
    for split in (opened.validation, opened.test):
        assert len(split) == 0 and split.labels.shape == (0,)


@pytest.mark.parametrize(
    ("labels", "fields", "words"),
    [
        ([0] * 20 + [1], {}, "the smallest of 1"),
        ([0, 1, 2] * 9, {"test_fraction": 0.01}, "`test_fraction` 0.01"),
        ([0, 1, 2] * 9, {"validation_fraction": 0.99}, "`validation_fraction` 0.99"),
        ([0] * 400 + [1] * 2, {"test_fraction": 0.98}, "stratified"),
    ],
)
def test_impossible_splits_are_refused(monkeypatch, labels, fields, words):
    with pytest.raises(InputError, match=words):
        opened_labels(monkeypatch, labels, **fields)


def test_a_seed_that_scikit_learn_does_not_take_is_refused(monkeypatch):
    """The message does not blame the classes; the largest valid seed works."""
    labels = [0] * 50 + [1, 2] * 10
    opened = opened_labels(monkeypatch, labels, train_images=28, split_seed=2**32 - 1)
    assert np.bincount(opened.train.labels).tolist() == [20, 4, 4]
    with pytest.raises(ValueError, match="split_seed"):
        DataConfig(split_seed=2**32)
    with pytest.raises(ValueError, match="random_state"):
        cuts.some(np.array(labels), 28, 2**32)


@pytest.mark.parametrize("mean, std, word", [
    ((123.675, 116.28, 103.53), (0.2, 0.2, 0.2), "`mean` 123.675"),
    ((-0.1,), (0.2,), "`mean` -0.1"),
    ((0.485,), (58.4,), "`std` 58.4"),
])  # fmt: skip
def test_statistics_of_pixels_from_0_to_255_are_refused(mean, std, word):
    with pytest.raises(ValueError, match=f"{word}.*divided by 255"):
        DataConfig(mean=mean, std=std)


@pytest.mark.parametrize("name", ["", "/no/such/folder", "some/folder"])
def test_a_path_without_its_kind_is_a_folder(tmp_path, name):
    with pytest.raises(ValueError, match=f"did you mean 'folder:{name or tmp_path}'"):
        DataConfig(dataset=name or str(tmp_path))


def test_limits_are_upper_limits(monkeypatch):
    labels = [0, 1, 2] * 20
    opened = opened_labels(monkeypatch, labels, train_images=2, eval_images=5)
    assert (len(opened.train), len(opened.validation), len(opened.test)) == (2, 5, 5)
    whole = opened_labels(monkeypatch, labels)
    more = opened_labels(monkeypatch, labels, train_images=10**6, eval_images=10**6)
    assert [len(more.train), len(more.test)] == [len(whole.train), len(whole.test)]
