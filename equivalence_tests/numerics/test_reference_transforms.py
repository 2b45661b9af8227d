"""The batch that a step sees under torchvision's second recipe is that of torchvision's references.

Their training transforms (`ClassificationPresetTrain` and the collate function of their train.py)
are put together from torchvision's own transforms, in their order, and given our draws.
"""

from contextlib import ExitStack
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from equivalence_tests.numerics.test_augment import from_torch, pixels
from flax_resnet.data import augment as A
from flax_resnet.data import policies as P
from flax_resnet.imagenet_recipes import IMAGENET_RECIPES
from flax_resnet.training import steps
from flax_resnet.training.network import Preprocess, Variables

pytestmark = pytest.mark.quick

CONFIG = IMAGENET_RECIPES["torchvision-resnet50-v2"].config
MEAN, STD, CLASSES = CONFIG.data.mean, CONFIG.data.std, 10
DRAWS = ("draw_flip", "draw_policy", "draw_erasing", "draw_mix")
LEVEL = 1 / 255 / min(STD)
EQUAL, OFF = 1e-5, 5e-3  # share of pixels that may be off: TrivialAugment truncates its results


def ours(batch: dict, step: int) -> tuple[steps.PreparedBatch, dict]:
    """The batch as the step prepares it, and what was drawn for it."""
    drawn = {}

    def noted(name, draw):
        def call(*args, **kwargs):
            drawn[name] = draw(*args, **kwargs)
            return drawn[name]

        return call

    state = steps.make_state(Variables({"weight": jnp.ones(1)}, {}, {}), CONFIG)
    state = state._replace(step=jnp.array(step))
    with ExitStack() as patched:
        for name in DRAWS:
            patched.enter_context(mock.patch.object(A, name, noted(name, getattr(A, name))))
        prepare = (state, batch, CONFIG, Preprocess(MEAN, STD))
        return steps.prepare_batch(*prepare, num_classes=CLASSES), drawn


def magnitude(name: str, argument: float) -> float:
    """The magnitude of one of torchvision's operations; ours takes what it computes with."""
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return argument - 1
    return argument / 255 if name == "Solarize" else argument


def theirs(batch: dict, drawn: dict, *, flip_last: bool = False):
    """Images and targets of torchvision's transforms for these draws."""
    policy = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
    after = []
    operations, arguments = (np.asarray(values)[:, 0] for values in drawn["draw_policy"])
    for number, levels in enumerate(np.asarray(batch["image"])):
        image, mirrored = Image.fromarray(levels), drawn["draw_flip"][number]
        image = F.horizontal_flip(image) if mirrored and not flip_last else image
        name = P.OPERATIONS[operations[number]]
        options = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": policy._fill}
        value = magnitude(name, float(arguments[number]))
        image = policy._apply_image_or_video_transform(image, name, value, **options)
        image = F.horizontal_flip(image) if mirrored and flip_last else image
        image = F.normalize(F.to_dtype(F.pil_to_tensor(image), scale=True), MEAN, STD)
        top, left, height, width = map(int, drawn["draw_erasing"][number])
        after.append(F.erase(image, top, left, height, width, torch.zeros(1)))
    labels = torch.tensor(np.asarray(batch["label"], np.int64))
    return mixed(torch.stack(after), labels, *drawn["draw_mix"])


def mixed(images, labels, weights, share):
    """MixUp or CutMix, as drawn, of a batch; the loss smooths the targets afterwards."""
    inside = np.argwhere(np.asarray(weights)[0, ..., 0] == 0)
    if not inside.size:
        transform, params = v2.MixUp(num_classes=CLASSES), {"lam": float(share)}
    else:
        y1, x1, y2, x2 = (*inside.min(0), *(inside.max(0) + 1))
        transform = v2.CutMix(num_classes=CLASSES)
        params = {"box": (x1, y1, x2, y2), "lam_adjusted": float(share)}
    with mock.patch.object(transform, "make_params", lambda _: params):
        images, targets = transform(images, labels)
    smoothing = CONFIG.optimizer.label_smoothing
    kind = type(transform).__name__
    return from_torch(images), targets * (1 - smoothing) + smoothing / CLASSES, kind


def batch() -> dict:
    images = pixels()
    labels = np.arange(len(images)) % CLASSES
    return {
        "image": jnp.asarray(images),
        "label": jnp.asarray(labels),
        "index": jnp.arange(len(images)),
    }


@pytest.fixture(scope="module")
def prepared():
    """The same batch in six steps."""
    return [ours(batch(), step) for step in range(6)]


def share_off(images, others) -> float:
    return float((np.abs(np.asarray(images) - np.asarray(others)) > EQUAL).mean())


def test_the_batch_of_a_step_is_that_of_torchvisions_references(prepared):
    kinds = set()
    for got, drawn in prepared:
        images, targets, kind = theirs(batch(), drawn)
        kinds.add(kind)
        difference = np.abs(np.asarray(got.images) - images)
        assert (difference > EQUAL).mean() < OFF and (difference > 1.01 * LEVEL).mean() < OFF / 2
        np.testing.assert_allclose(got.targets, targets, atol=1e-6)
    assert kinds == {"MixUp", "CutMix"}
    erased = sum(int((np.asarray(drawn["draw_erasing"])[:, 2] > 0).sum()) for _, drawn in prepared)
    assert erased > 5


@pytest.mark.control
def test_the_order_of_the_transforms_matters(prepared):
    got, drawn = prepared[0]
    assert share_off(got.images, theirs(batch(), drawn, flip_last=True)[0]) > 2 * OFF
