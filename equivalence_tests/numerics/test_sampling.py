"""Repeated augmentation has RASampler's order, balanced draws WeightedRandomSampler's chances."""

import numpy as np
import pytest

from flax_resnet.data.pipeline import BatchOrder

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_has_the_order_of_rasampler(repeats):
    """A batch holds what `repeats` devices of torchvision's RASampler would have, in this order."""
    order = BatchOrder(num_images=50, batch_size=12, seed=3, epochs=2, repeats=repeats)
    plain = BatchOrder(num_images=50, batch_size=50, seed=3, epochs=2)
    assert len(order) == 8
    for epoch in range(2):
        every = np.repeat(plain[epoch], repeats)
        devices = [every[device::repeats] for device in range(repeats)]
        for step in range(4):
            share = slice(step * 12 // repeats, (step + 1) * 12 // repeats)
            batch = order[4 * epoch + step]
            np.testing.assert_array_equal(batch % 50, np.concatenate([d[share] for d in devices]))
            assert len(set(batch.tolist())) == 12, "copies share their random draws"
            assert batch.max() < 50 * repeats


def test_balanced_draws_have_equal_classes():
    labels = np.repeat([0, 1, 2], [600, 60, 6])
    order = BatchOrder(num_images=666, batch_size=222, seed=0, epochs=10, labels=labels)
    drawn = np.concatenate([order[step] for step in range(len(order))])
    assert np.abs(np.bincount(labels[drawn % 666]) / len(drawn) - 1 / 3).max() < 0.03
    assert len(set(order[0].tolist())) == 222, "copies share their random draws"
    again = BatchOrder(num_images=666, batch_size=222, seed=0, epochs=10, labels=labels)
    np.testing.assert_array_equal(order[4], again[4])
    assert not (order[0] == order[3]).all()
