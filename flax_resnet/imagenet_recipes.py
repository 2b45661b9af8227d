"""Recipes of public ResNet weights for ImageNet, as `--recipe` takes them.

The batch size is that of all devices together, as in the source; the learning rate belongs to it.
`--dataset` names the images, `--batch-size` and `--lr` go together.
"""

from flax_resnet.config import TrainConfig
from flax_resnet.recipes import BEST_ACCURACY, IMAGENET_MEAN, IMAGENET_STD, Recipe

IMAGENET = "tfds:imagenet2012"


def _config(*, resize: int, batch_size: int, **groups) -> TrainConfig:
    """The config of a recipe that trains on random resized crops and evaluates at 224 pixels."""
    data = dict(
        dataset=IMAGENET,
        image_size=224,
        resize_size=resize,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        cache="none",
    )
    augment = dict(random_resized_crop=True, random_crop=0, horizontal_flip=0.5)
    return TrainConfig(
        batch_size=batch_size,
        early_stopping=BEST_ACCURACY,
        data=data | groups.pop("data", {}),
        augment=augment | groups.pop("augment", {}),
        **groups,
    )


def _torchvision_v1(arch: str, accuracy: float, epochs: int = 90) -> Recipe:
    config = _config(
        resize=256,
        batch_size=256,  # 8 x 32
        epochs=epochs,
        model=dict(arch=arch, stem="imagenet"),
        optimizer=dict(lr=0.1, nesterov=False, weight_decay=1e-4, label_smoothing=0.0),
        schedule=dict(schedule="step", step_epochs=30, schedule_per="epoch"),
    )
    return Recipe(
        config=config,
        method="SGD 0.1, a tenth every 30 epochs, random resized crop and flip",
        published={"validation_accuracy": accuracy},
        source=f"torchvision, {arch}, IMAGENET1K_V1",
        gpu=True,
    )


_V2_BATCH, _V2_EPOCHS, _V2_EMA_STEPS = 1024, 600, 32

_V2 = Recipe(
    config=_config(
        resize=232,
        batch_size=_V2_BATCH,  # 8 x 128
        epochs=_V2_EPOCHS,
        model=dict(arch="resnet50", stem="imagenet"),
        data=dict(train_size=176),
        augment=dict(
            auto_augment="ta_wide",
            random_erasing=0.1,
            mixup=0.2,
            cutmix=1.0,
            repeated_augmentation=4,
        ),
        optimizer=dict(
            lr=0.5,
            nesterov=False,
            weight_decay=2e-5,
            norm_weight_decay=0.0,
            label_smoothing=0.1,
            # torchvision scales the share 1 - 0.99998 by images an update and epochs.
            ema_decay=1 - (1 - 0.99998) * _V2_BATCH * _V2_EMA_STEPS / _V2_EPOCHS,
            ema_steps=_V2_EMA_STEPS,
            ema_after_warmup=True,
        ),
        schedule=dict(schedule="cosine", warmup_epochs=5, schedule_per="epoch"),
    ),
    method="600 epochs at 176 px, cosine, TrivialAugment, MixUp and CutMix, erasing, repeated"
    " augmentation, average of the weights",
    published={"validation_accuracy": 0.80858},
    source="torchvision, resnet50, IMAGENET1K_V2",
    gpu=True,
)


def _timm(name, accuracy, *, epochs, lr, policy, optimizer, augment, **groups) -> Recipe:
    """A recipe of "ResNet strikes back" (arXiv:2110.00476, table 2), with timm's defaults."""
    config = _config(
        resize=235,  # timm rounds 224 / 0.95 down
        batch_size=2048,
        epochs=epochs,
        model=dict(
            arch="resnet50", stem="imagenet", zero_init_residual=True, dtype="bfloat16"
        ) | groups.pop("model", {}),
        data=dict(interpolation="bicubic") | groups.pop("data", {}),
        augment=dict(auto_augment=policy, cutmix=1.0) | augment,
        optimizer=dict(
            optimizer="lamb",
            lr=lr,
            eps=1e-6,
            clip_norm=1.0,
            decay_norm_and_bias=False,
            loss="bce",
        ) | optimizer,
        schedule=dict(
            schedule="cosine",
            warmup_epochs=5,
            warmup_factor=1e-4 / lr,
            warmup_within=True,
            min_lr=1e-6,
            schedule_per="epoch",
        ),
    )  # fmt: skip
    return Recipe(
        config=config,
        method=f"LAMB, binary cross-entropy, {policy}, MixUp and CutMix, {epochs} epochs",
        published={"validation_accuracy": accuracy},
        source=f"arXiv:2110.00476, procedure {name}",
        gpu=True,
    )


IMAGENET_RECIPES = {
    "he2015-imagenet": Recipe(
        config=_config(
            resize=256,
            batch_size=256,
            epochs=120,
            model=dict(arch="resnet50", stem="imagenet"),
            # A square of 224 pixels in images whose shorter side is 256 to 480.
            augment=dict(scale=(0.218, 0.766), ratio=(1.0, 1.0)),
            optimizer=dict(lr=0.1, nesterov=False, weight_decay=1e-4, label_smoothing=0.0),
            schedule=dict(schedule="plateau", schedule_per="epoch"),
        ),
        method="SGD 0.1, a tenth on a plateau, crops of several sizes and flip; without the"
        " source's colour noise",
        source="He et al. 2015, section 3.4",
        gpu=True,
    ),
    "torchvision-resnet18-v1": _torchvision_v1("resnet18", 0.69758),
    "torchvision-resnet34-v1": _torchvision_v1("resnet34", 0.73314),
    "torchvision-resnet50-v1": _torchvision_v1("resnet50", 0.7613),
    "torchvision-resnet101-v1": _torchvision_v1("resnet101", 0.77374),
    "torchvision-resnet152-v1": _torchvision_v1("resnet152", 0.78312),
    "torchvision-resnext50_32x4d-v1": _torchvision_v1("resnext50_32x4d", 0.77618, 100),
    "torchvision-resnext101_32x8d-v1": _torchvision_v1("resnext101_32x8d", 0.79312, 100),
    "torchvision-resnet50-v2": _V2,
    "timm-a1": _timm(
        "A1",
        0.804,
        epochs=600,
        lr=5e-3,
        policy="rand-m7-mstd0.5-inc1",
        model=dict(stochastic_depth=0.05),
        augment=dict(mixup=0.2, repeated_augmentation=3),
        optimizer=dict(weight_decay=0.01, label_smoothing=0.1),
    ),
    "timm-a2": _timm(
        "A2",
        0.798,
        epochs=300,
        lr=5e-3,
        policy="rand-m7-mstd0.5-inc1",
        model=dict(stochastic_depth=0.05),
        augment=dict(mixup=0.1, repeated_augmentation=3),
        optimizer=dict(weight_decay=0.02, label_smoothing=0.0, bce_threshold=0.2),
    ),
    "timm-a3": _timm(
        "A3",
        0.781,
        epochs=100,
        lr=8e-3,
        policy="rand-m6-mstd0.5-inc1",
        data=dict(train_size=160),
        augment=dict(mixup=0.1),
        optimizer=dict(weight_decay=0.02, label_smoothing=0.0, bce_threshold=0.2),
    ),
}
