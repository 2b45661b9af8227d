"""Recipes: named configs, each for one published figure.

`python scripts/train.py --recipe NAME` runs one, `python scripts/reproduce.py NAME` runs one over
seeds and makes the table of results. The data set of a recipe is the public one; `--dataset
folder:DIR` takes another copy of it. A name with a suffix is another way to the same figure, where
the source's own settings fall short or take a GPU.
"""

import dataclasses

from flax_resnet.config import TrainConfig

CIFAR10 = "tfds:cifar10"
IMAGENETTE = "tfds:imagenette/320px-v2"
HALF = (0.5, 0.5, 0.5)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A config and the published figures that it belongs to: one row of the table of results."""

    config: TrainConfig

    method: str
    """The method in one line."""

    published: dict[str, float] = dataclasses.field(default_factory=dict)
    """The source's figures, "split_metric" -> value; empty where the source has none."""

    source: str = ""
    """The publication of the figures."""

    starts_from: str | None = None
    """Name of the recipe whose weights are fine-tuned."""

    gpu: bool = False
    """True if the recipe takes hours on a CPU, minutes on a GPU."""


FLIP = dict(horizontal_flip=0.5, random_crop=0)
FLIP_AND_CROP = dict(horizontal_flip=0.5, random_crop=4)
ADAM = dict(optimizer="adam", lr=1e-3, weight_decay=0.0, label_smoothing=0.0)
SGD = dict(optimizer="sgd", lr=0.05, weight_decay=5e-4, label_smoothing=0.0)
BEST_ACCURACY = dict(monitor="validation_accuracy")


def _resnet18_32(**optimizer) -> dict:
    """Settings of ResNet-18 with the 7x7 stem on images of 32 pixels."""
    return dict(
        epochs=46,
        model=dict(arch="resnet18", stem="imagenet"),
        data=dict(dataset=CIFAR10, image_size=32, mean=HALF, std=HALF),
        augment=FLIP,
        optimizer=dict(lr=0.1, weight_decay=0.0, label_smoothing=0.0) | optimizer,
        early_stopping=BEST_ACCURACY,
    )


def _enlarged(epochs, lr, pixels=64, validation_fraction=0.1, **groups) -> TrainConfig:
    """The config of ResNet-18 with the 7x7 stem on enlarged images of CIFAR-10."""
    return TrainConfig(
        epochs=epochs,
        model=dict(arch="resnet18", stem="imagenet"),
        data=dict(dataset=CIFAR10, image_size=pixels, validation_fraction=validation_fraction),
        augment=dict(horizontal_flip=0.5, random_crop=pixels // 8),
        optimizer=dict(lr=lr),
        **{"early_stopping": BEST_ACCURACY} | groups,
    )


ALL_THREE = dict(dropout=0.5, weight_decay=1e-4, patience=5)
"""The regularisers of a public comparison."""

ALL_THREE_BY_SGD = dict(
    dropout=0.5, weight_decay=5e-4, patience=5, stem="imagenet", optimizer=SGD, schedule="cosine"
)
"""Settings with which `_regularized` trains ResNet-18 with the 7x7 stem by SGD."""

PUBLISHED_ALL_THREE = {
    "test_accuracy": 0.8793,
    "test_loss": 0.3229,
    "test_precision_macro": 0.8884,
    "test_recall_macro": 0.8793,
    "test_f1_macro": 0.8801,
    "validation_accuracy": 0.8787,
    "validation_loss": 0.3312,
}


def _regularized(
    dropout=0.0,
    weight_decay=0.0,
    patience=0,
    stem="cifar",
    pixels=32,
    epochs=40,
    schedule="constant",
    optimizer=ADAM,
    dtype="float32",
    validation_fraction=0.1,
) -> TrainConfig:
    """The config of ResNet-18 with dropout, weight decay or early stopping. Restoring the best
    weights belongs to early stopping; without it the last weights are reported."""
    return TrainConfig(
        epochs=epochs,
        model=dict(arch="resnet18", stem=stem, dropout=dropout, dtype=dtype),
        data=dict(dataset=CIFAR10, image_size=pixels, validation_fraction=validation_fraction),
        augment=dict(horizontal_flip=0.5, random_crop=pixels // 8),
        optimizer=optimizer | dict(weight_decay=weight_decay),
        schedule=dict(schedule=schedule),
        early_stopping=dict(patience=patience, restore_best=patience > 0),
    )


def _resized(arch, pixels=224, **changes) -> TrainConfig:
    """The config of a network on enlarged images of CIFAR-10, split 80/20."""
    groups = dict(
        model=dict(arch=arch, stem="imagenet"),
        data=dict(
            dataset=CIFAR10,
            image_size=pixels,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            validation_fraction=0.2,
        ),
        augment=dict(random_crop=0),
        optimizer=ADAM,
        schedule=dict(schedule="constant"),
    )
    return TrainConfig(**{k: groups.get(k, {}) | v if isinstance(v, dict) else v
                      for k, v in (groups | changes).items()})  # fmt: skip


def _bottleneck(arch, epochs, pixels=224, **changes) -> TrainConfig:
    stopping = dict(monitor="validation_accuracy", min_delta=1e-4, patience=5)
    return _resized(arch, pixels, epochs=epochs, batch_size=32, early_stopping=stopping, **changes)


BY_SGD = dict(schedule="onecycle", optimizer=SGD | dict(lr=0.1), dtype="bfloat16", patience=10)
"""Settings with which `_against_overfitting` trains ResNet-18 by SGD."""


def _against_overfitting(
    pixels=224,
    epochs=20,
    schedule="constant",
    optimizer=ADAM | dict(weight_decay=1e-4),
    dtype="float32",
    patience=3,
) -> TrainConfig:
    """The config of ResNet-18 with decay, dropout, flip, crop, and early stopping on the loss."""
    return _resized(
        "resnet18",
        pixels,
        epochs=epochs,
        schedule=dict(schedule=schedule),
        model=dict(arch="resnet18", stem="imagenet", dropout=0.5, dtype=dtype),
        augment=dict(horizontal_flip=0.5, random_crop=pixels // 8),
        optimizer=optimizer,
        early_stopping=dict(patience=patience),
    )


def _overfitting(pixels=224, epochs=20, **changes) -> TrainConfig:
    stopping = dict(restore_best=False)
    return _resized("resnet18", pixels, epochs=epochs, early_stopping=stopping, **changes)


PLAIN_BY_SGD = dict(
    epochs=6,
    model=dict(arch="resnet18", stem="imagenet", dtype="bfloat16"),
    optimizer=SGD | dict(lr=0.1, weight_decay=0.0),
    schedule=dict(schedule="onecycle"),
)
"""Settings with which `_overfitting` trains ResNet-18 by SGD."""


def _he(arch) -> TrainConfig:
    """The config of He et al. 2015, section 4.2: 64,000 steps of 128 images, with cuts of the
    learning rate after 32,000 and 48,000."""
    warm_up = dict(warmup_epochs=1, warmup_factor=0.1) if arch == "resnet110" else {}
    return TrainConfig(
        epochs=182,
        model=dict(arch=arch),
        data=dict(dataset=CIFAR10),
        augment=FLIP_AND_CROP,
        optimizer=dict(lr=0.1, nesterov=False, weight_decay=1e-4, label_smoothing=0.0),
        schedule=dict(schedule="multistep", milestones=(91, 137)) | warm_up,
        early_stopping=BEST_ACCURACY,
    )


def _short_resnet20(epochs, lr, pixels=32, **groups) -> TrainConfig:
    return TrainConfig(
        epochs=epochs,
        model=dict(arch="resnet20"),
        data=dict(dataset=CIFAR10, image_size=pixels, validation_fraction=0.04),
        augment=dict(horizontal_flip=0.5, random_crop=pixels // 8),
        optimizer=dict(lr=lr, label_smoothing=0.0),
        **{"early_stopping": BEST_ACCURACY} | groups,
    )


def _he_recipe(depth: int, error: float) -> Recipe:
    return Recipe(
        config=_he(f"resnet{depth}"),
        method="SGD 0.1, weight decay 1e-4, flip and crop, about 64,000 steps of 128",
        published={"test_accuracy": round(1 - error / 100, 4)},
        source="He et al. 2015, table 6",
        gpu=True,
    )


def _imagenette(**groups) -> TrainConfig:
    data = dict(dataset=IMAGENETTE, image_size=64)
    return TrainConfig(**groups | {"data": data | groups.get("data", {})})


RECIPES = {
    "cifar10-resnet18": Recipe(
        config=TrainConfig(**_resnet18_32(l1=1e-5)),
        method="ResNet-18, 7x7 stem at 32 px, flip, L1, one-cycle, batch 128, std 0.5",
        published={"test_accuracy": 0.8766},
        source="a public ResNet-18 on CIFAR-10 in PyTorch",
    ),
    "cifar10-resnet18-64px": Recipe(
        config=_enlarged(12, lr=0.1),
        method="ResNet-18 with the 7x7 stem on images enlarged from 32 to 64 px",
        published={"test_accuracy": 0.85},
        source="a public ResNet-18 on CIFAR-10 in PyTorch, by epoch 12",
    ),
    "cifar10-resnet18-48px-start": Recipe(
        config=_enlarged(
            6,
            lr=0.1,
            pixels=48,
            validation_fraction=0.04,
            schedule=dict(schedule="constant", warmup_epochs=1),
            early_stopping=BEST_ACCURACY | dict(restore_best=False),
        ),
        method="6 epochs at 48 px on 48,000 images, to start cifar10-resnet18-48-to-80px from",
    ),
    "cifar10-resnet18-48-to-80px": Recipe(
        config=_enlarged(
            5, lr=0.1, pixels=80, validation_fraction=0.04, schedule=dict(schedule="cosine")
        ),
        starts_from="cifar10-resnet18-48px-start",
        method="5 more epochs at 80 px, 11 in all",
        published={"test_accuracy": 0.85},
        source="a public ResNet-18 on CIFAR-10 in PyTorch, by epoch 12",
    ),
    "cifar10-resnet18-48-to-64px": Recipe(
        config=_enlarged(
            10,
            lr=0.1,
            validation_fraction=0.04,
            schedule=dict(schedule="constant"),
            early_stopping=BEST_ACCURACY | dict(restore_best=False),
        ),
        starts_from="cifar10-resnet18-48px-start",
        method="10 more epochs at 64 px, to start cifar10-resnet18-64-to-80px from",
    ),
    "cifar10-resnet18-64-to-80px": Recipe(
        config=_enlarged(
            8, lr=0.1, pixels=80, validation_fraction=0.04, schedule=dict(schedule="cosine")
        ),
        starts_from="cifar10-resnet18-48-to-64px",
        method="8 more epochs at 80 px, 24 in all",
        published={"test_accuracy": 0.8766},
        source="a public ResNet-18 on CIFAR-10 in PyTorch, by epoch 46",
    ),
    "resnet18-regularized": Recipe(
        config=_regularized(**ALL_THREE),
        method="ResNet-18, 3x3 stem, Adam, weight decay, dropout 0.5, early stopping",
        published=PUBLISHED_ALL_THREE,
        source="a public comparison of regularisers on ResNet-18 in PyTorch",
        gpu=True,
    ),
    "resnet18-regularized-base": Recipe(
        config=_regularized(),
        method="ResNet-18, 3x3 stem, Adam, without the three regularisers",
        gpu=True,
    ),
    "resnet18-regularized-decay": Recipe(
        config=_regularized(weight_decay=1e-4),
        method="ResNet-18, 3x3 stem, Adam, weight decay",
        gpu=True,
    ),
    "resnet18-regularized-7x7": Recipe(
        config=_regularized(**ALL_THREE, stem="imagenet"),
        method="resnet18-regularized with the 7x7 stem, which one CPU core can finish",
    ),
    "resnet18-regularized-32-to-80px": Recipe(
        config=_regularized(**ALL_THREE, stem="imagenet", pixels=80, epochs=8, schedule="cosine"),
        starts_from="resnet18-regularized-7x7",
        method="8 more epochs at 80 px with a cosine schedule, from the weights of"
        " resnet18-regularized-7x7",
        published=PUBLISHED_ALL_THREE,
        source="a public comparison of regularisers on ResNet-18 in PyTorch",
    ),
    "resnet18-regularized-80px-sgd": Recipe(
        config=_regularized(**ALL_THREE_BY_SGD, pixels=80, epochs=10),
        starts_from="resnet18-regularized-32-to-80px",
        method="10 more epochs at 80 px by SGD with a weight decay of 5e-4, from the weights of"
        " resnet18-regularized-32-to-80px",
        published=PUBLISHED_ALL_THREE,
        source="a public comparison of regularisers on ResNet-18 in PyTorch",
    ),
    "resnet18-regularized-80px": Recipe(
        config=_regularized(
            **ALL_THREE_BY_SGD
            | dict(schedule="onecycle", optimizer=SGD | dict(lr=0.1), patience=10),
            pixels=80,
            epochs=20,
            dtype="bfloat16",
            validation_fraction=0.04,
        ),
        method="ResNet-18, 7x7 stem, 80 px, bfloat16, SGD, one-cycle, weight decay 5e-4, dropout"
        " 0.5, early stopping",
        published=PUBLISHED_ALL_THREE,
        source="a public comparison of regularisers on ResNet-18 in PyTorch",
    ),
    "resnet18-regularized-80-to-112px": Recipe(
        config=_regularized(
            **ALL_THREE_BY_SGD, pixels=112, epochs=6, dtype="bfloat16", validation_fraction=0.04
        ),
        starts_from="resnet18-regularized-80px",
        method="6 more epochs at 112 px with a cosine schedule, from the weights of"
        " resnet18-regularized-80px",
        published=PUBLISHED_ALL_THREE,
        source="a public comparison of regularisers on ResNet-18 in PyTorch",
    ),
    "resnet18-regularized-sgd": Recipe(
        config=_regularized(
            dropout=0.5,
            weight_decay=5e-4,
            patience=5,
            epochs=8,
            schedule="onecycle",
            optimizer=SGD | dict(lr=0.1),
        ),
        method="ResNet-18, 3x3 stem, SGD, one-cycle, weight decay 5e-4, dropout 0.5, early"
        " stopping",
        published=PUBLISHED_ALL_THREE,
        source="a public comparison of regularisers on ResNet-18 in PyTorch",
    ),
    "resnet18-regularized-base-7x7": Recipe(
        config=_regularized(stem="imagenet"),
        method="resnet18-regularized-base with the 7x7 stem",
    ),
    "resnet18-regularized-decay-7x7": Recipe(
        config=_regularized(weight_decay=1e-4, stem="imagenet"),
        method="ResNet-18, 7x7 stem, Adam, weight decay 1e-4",
    ),
    "resnet18-224": Recipe(
        config=_against_overfitting(),
        method="224 px, weight decay 1e-4, dropout 0.5, flip and crop, early stopping on the loss",
        published={"validation_accuracy": 0.8676, "validation_loss": 0.3355},
        source="a public study of overfitting with ResNet-18 in PyTorch",
        gpu=True,
    ),
    "resnet18-224-plain": Recipe(
        config=_overfitting(),
        method="224 px, without weight decay, dropout, flip, crop and early stopping",
        published={"validation_accuracy": 0.8144, "validation_loss": 0.4898},
        source="a public study of overfitting with ResNet-18 in PyTorch",
        gpu=True,
    ),
    "resnet18-48px": Recipe(
        config=_against_overfitting(48),
        method="48 px, Adam, weight decay 1e-4, dropout 0.5, flip and crop, early stopping on the"
        " loss",
        published={"validation_accuracy": 0.8676, "validation_loss": 0.3355},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "resnet18-48-to-80px": Recipe(
        config=_against_overfitting(80, epochs=8, schedule="cosine", optimizer=SGD),
        starts_from="resnet18-48px",
        method="8 more epochs at 80 px by SGD with a weight decay of 5e-4 and a cosine schedule,"
        " from the weights of resnet18-48px",
        published={"validation_accuracy": 0.8676, "validation_loss": 0.3355},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "resnet18-80-to-112px": Recipe(
        config=_against_overfitting(112, epochs=4, schedule="cosine", optimizer=SGD),
        starts_from="resnet18-48-to-80px",
        method="4 more epochs at 112 px, from the weights of resnet18-48-to-80px",
        published={"validation_accuracy": 0.8676, "validation_loss": 0.3355},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "resnet18-80px": Recipe(
        config=_against_overfitting(80, 30, **BY_SGD),
        method="80 px, bfloat16, SGD, one-cycle, weight decay 5e-4, dropout 0.5, flip and crop,"
        " early stopping on the loss",
        published={"validation_accuracy": 0.8676, "validation_loss": 0.3355},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "resnet18-112px": Recipe(
        config=_against_overfitting(112, 14, **BY_SGD),
        method="112 px, bfloat16, SGD, one-cycle, weight decay 5e-4, dropout 0.5, flip and crop,"
        " early stopping on the loss",
        published={"validation_accuracy": 0.8676, "validation_loss": 0.3355},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "resnet18-112px-from-80px": Recipe(
        config=_against_overfitting(
            112, epochs=6, schedule="cosine", optimizer=SGD, dtype="bfloat16"
        ),
        starts_from="resnet18-80px",
        method="6 more epochs at 112 px with a cosine schedule, from the weights of resnet18-80px",
        published={"validation_accuracy": 0.8676, "validation_loss": 0.3355},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "resnet18-48px-plain": Recipe(
        config=_overfitting(48),
        method="48 px, without weight decay, dropout, flip, crop and early stopping",
        published={"validation_accuracy": 0.8144, "validation_loss": 0.4898},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "resnet18-112px-plain": Recipe(
        config=_overfitting(112, **PLAIN_BY_SGD),
        method="112 px, bfloat16, SGD, one-cycle, without weight decay, dropout, flip, crop and"
        " early stopping",
        published={"validation_accuracy": 0.8144, "validation_loss": 0.4898},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "resnet18-112px-plain-batch-32": Recipe(
        config=_overfitting(112, batch_size=32, **PLAIN_BY_SGD),
        method="resnet18-112px-plain with batches of 32 images instead of 128",
        published={"validation_accuracy": 0.8144, "validation_loss": 0.4898},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "resnet18-112px-plain-10-epochs": Recipe(
        config=_overfitting(112, batch_size=32, **PLAIN_BY_SGD | dict(epochs=10)),
        method="resnet18-112px-plain-batch-32 for 10 epochs instead of 6",
        published={"validation_accuracy": 0.8144, "validation_loss": 0.4898},
        source="a public study of overfitting with ResNet-18 in PyTorch",
    ),
    "imagenette-cnn": Recipe(
        config=_imagenette(
            epochs=15,
            model=dict(arch="basic_cnn", dropout=0.3),
            data=dict(grayscale=True),
            augment=dict(horizontal_flip=0.5, random_crop=0),
            optimizer=ADAM,
            schedule=dict(schedule="cosine"),
        ),
        method="3 convolutions, 2 dense layers, dropout 0.3, grayscale, 64 px, Adam, flip, cosine",
        published={"test_accuracy": 0.6308},
        source="a public CNN and ResNet-18 on Imagenette in PyTorch",
    ),
    "imagenette-cnn-plain": Recipe(
        config=_imagenette(
            epochs=15,
            model=dict(arch="basic_cnn", dropout=0.3),
            data=dict(grayscale=True),
            augment=dict(random_crop=0),
            optimizer=ADAM,
            schedule=dict(schedule="constant"),
        ),
        method="imagenette-cnn without flip and cosine",
        published={"test_accuracy": 0.6308},
        source="a public CNN and ResNet-18 on Imagenette in PyTorch",
    ),
    "imagenette-resnet18": Recipe(
        config=_imagenette(
            epochs=15,
            model=dict(arch="resnet18", stem="imagenet"),
            data=dict(grayscale=True),
            augment=dict(random_crop=0),
            optimizer=ADAM,
            schedule=dict(schedule="constant"),
            early_stopping=dict(patience=5),
        ),
        method="ResNet-18, 7x7 stem, grayscale at 64 px, Adam, early stopping",
        published={"test_accuracy": 0.5640},
        source="a public CNN and ResNet-18 on Imagenette in PyTorch",
    ),
    "cifar10-resnet18-dropout": Recipe(
        config=TrainConfig(
            epochs=20,
            model=dict(arch="resnet18", stem="cifar", dropout=0.5),
            data=dict(dataset=CIFAR10),
            augment=FLIP | dict(rotation=15, brightness=0.2, contrast=0.2, saturation=0.2),
            optimizer=ADAM,
            schedule=dict(schedule="constant"),
            early_stopping=dict(patience=5),
        ),
        method="ResNet-18, 3x3 stem, Adam, dropout 0.5, flip, rotation, colour jitter",
        published={"test_accuracy": 0.8206},
        source="a public ResNet-18 with dropout in PyTorch",
        gpu=True,
    ),
    "transfer-source": Recipe(
        config=_imagenette(
            epochs=20,
            model=dict(arch="resnet18", stem="imagenet"),
            augment=dict(horizontal_flip=0.5, random_crop=8),
            optimizer=dict(lr=0.05),
            early_stopping=BEST_ACCURACY,
        ),
        method="Imagenette at 64 px, to start transfer and transfer-12-epochs from",
    ),
    "transfer": Recipe(
        config=_enlarged(5, lr=0.02),
        starts_from="transfer-source",
        method="5 epochs on CIFAR-10 at 64 px from the weights of transfer-source",
        published={"validation_accuracy": 0.834, "validation_loss": 0.65},
        source="a public transfer from Imagenette to CIFAR-10 in PyTorch",
    ),
    "transfer-12-epochs": Recipe(
        config=_enlarged(12, lr=0.02),
        starts_from="transfer-source",
        method="12 epochs on CIFAR-10 at 64 px from the weights of transfer-source",
        published={"validation_accuracy": 0.834, "validation_loss": 0.65},
        source="a public transfer from Imagenette to CIFAR-10 in PyTorch",
    ),
    "transfer-scratch": Recipe(
        config=_enlarged(5, lr=0.05),
        method="5 epochs on CIFAR-10 at 64 px from random weights",
        published={"validation_accuracy": 0.786, "validation_loss": 0.964},
        source="a public transfer from Imagenette to CIFAR-10 in PyTorch",
    ),
    "cifar10-resnet50-224": Recipe(
        config=_bottleneck("resnet50", epochs=2),
        method="ResNet-50, 224 px, Adam 1e-3, batch 32, 2 epochs",
        published={"test_accuracy": 0.5647, "test_loss": 1.1774},
        source="a public comparison of ResNet-50 and ResNet-101 in PyTorch",
        gpu=True,
    ),
    "cifar10-resnet50-64px": Recipe(
        config=_bottleneck("resnet50", epochs=2, pixels=64),
        method="ResNet-50, 64 px (one CPU core can finish it), Adam 1e-3, batch 32, 2 epochs",
        published={"test_accuracy": 0.5647, "test_loss": 1.1774},
        source="a public comparison of ResNet-50 and ResNet-101 in PyTorch",
    ),
    "cifar10-resnet101-224": Recipe(
        config=_bottleneck("resnet101", epochs=6),
        method="ResNet-101, 224 px, Adam 1e-3, batch 32, 6 epochs",
        published={"test_accuracy": 0.7312, "test_loss": 0.8384},
        source="a public comparison of ResNet-50 and ResNet-101 in PyTorch",
        gpu=True,
    ),
    "cifar10-resnet101-64px": Recipe(
        config=_bottleneck("resnet101", epochs=6, pixels=64),
        method="ResNet-101, 64 px, Adam 1e-3, batch 32, 6 epochs",
        published={"test_accuracy": 0.7312, "test_loss": 0.8384},
        source="a public comparison of ResNet-50 and ResNet-101 in PyTorch",
    ),
    "cifar10-resnet101-64px-one-cycle": Recipe(
        config=_bottleneck(
            "resnet101",
            epochs=6,
            pixels=64,
            model=dict(zero_init_residual=True, dtype="bfloat16"),
            augment=dict(horizontal_flip=0.5),
            schedule=dict(schedule="onecycle"),
        ),
        method="ResNet-101, 64 px, bfloat16, Adam, one-cycle up to 1e-3, batch 32, 6 epochs, flip",
        published={"test_accuracy": 0.7312, "test_loss": 0.8384},
        source="a public comparison of ResNet-50 and ResNet-101 in PyTorch",
    ),
    "cifar10-resnet20": _he_recipe(20, 8.75),
    "cifar10-resnet32": _he_recipe(32, 7.51),
    "cifar10-resnet44": _he_recipe(44, 7.17),
    "cifar10-resnet56": _he_recipe(56, 6.97),
    "cifar10-resnet110": _he_recipe(110, 6.43),
    "cifar10-resnet20-short": Recipe(
        config=_short_resnet20(30, lr=0.2),
        method="one-cycle up to 0.2, a sixth of the epochs, for two CPU cores",
        published={"test_accuracy": 0.9125},
        source="He et al. 2015, table 6",
    ),
    "cifar10-resnet20-24px-start": Recipe(
        config=_short_resnet20(
            18,
            lr=0.1,
            pixels=24,
            schedule=dict(schedule="constant", warmup_epochs=1),
            early_stopping=BEST_ACCURACY | dict(restore_best=False),
        ),
        method="18 epochs at 24 px, to start cifar10-resnet20-24-to-32px from",
    ),
    "cifar10-resnet20-24-to-32px": Recipe(
        config=_short_resnet20(18, lr=0.1, schedule=dict(schedule="cosine")),
        starts_from="cifar10-resnet20-24px-start",
        method="18 more epochs at 32 px, 36 in all",
        published={"test_accuracy": 0.9125},
        source="He et al. 2015, table 6",
    ),
    "cifar10-fast": Recipe(
        config=TrainConfig(
            epochs=18,
            batch_size=512,
            model=dict(arch="resnet18", stem="cifar", dtype="bfloat16"),
            data=dict(dataset=CIFAR10, mean=CIFAR10_MEAN, std=CIFAR10_STD),
            augment=FLIP_AND_CROP,
            optimizer=dict(lr=0.4, label_smoothing=0.2, decay_norm_and_bias=False),
            early_stopping=BEST_ACCURACY,
        ),
        method="ResNet-18, 3x3 stem, bfloat16, one-cycle, label smoothing 0.2, 18 epochs",
        published={"test_accuracy": 0.9547},
        source="pytorch-cifar",
        gpu=True,
    ),
}

COMPARISONS = {
    "Weight decay, dropout and early stopping against overfitting": (
        "resnet18-regularized-base", "resnet18-regularized-decay", "resnet18-regularized",
    ),
    "Weight decay, dropout and early stopping, 7x7 stem": (
        "resnet18-regularized-base-7x7", "resnet18-regularized-decay-7x7",
        "resnet18-regularized-7x7",
    ),
    "All regularisers with Adam and with SGD": (
        "resnet18-regularized", "resnet18-regularized-80px",
    ),
    "Dropout with flips, rotation and colour jitter, and flips and crops alone": (
        "resnet18-regularized-base", "cifar10-resnet18-dropout",
    ),
    "ResNet-20 in both frameworks": ("cifar10-resnet20",),
    "Regularised, at 48, 80 and 112 pixels": (
        "resnet18-48px", "resnet18-80px", "resnet18-112px",
    ),
    "Regularised and not, at 224 pixels": ("resnet18-224-plain", "resnet18-224"),
    "Regularised and not, at 112 pixels": (
        "resnet18-112px-plain", "resnet18-112px-plain-batch-32",
        "resnet18-112px-plain-10-epochs", "resnet18-112px", "resnet18-112px-from-80px",
    ),
    "Regularised and not, at 48 pixels": ("resnet18-48px-plain", "resnet18-48px"),
    "Fine-tuned from Imagenette and from scratch": ("transfer-scratch", "transfer"),
    "Fine-tuned and from scratch, 12 epochs": ("cifar10-resnet18-64px", "transfer-12-epochs"),
    "A plain CNN and a ResNet on the same images": (
        "imagenette-cnn-plain", "imagenette-cnn", "imagenette-resnet18",
    ),
    "More pixels through the same stem": ("cifar10-resnet18", "cifar10-resnet18-64px"),
    "ResNet-50 and ResNet-101, 224 pixels": ("cifar10-resnet50-224", "cifar10-resnet101-224"),
    "ResNet-50 and ResNet-101, 64 pixels": (
        "cifar10-resnet50-64px", "cifar10-resnet101-64px", "cifar10-resnet101-64px-one-cycle",
    ),
}  # fmt: skip
"""{title: recipes to compare, the plainer one first; or one recipe, to compare its frameworks}"""
