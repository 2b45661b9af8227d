"""Public JAX networks and PyTorch's of the same structure, for `flax-resnet parity`.

Each function imports what it needs, so only the packages of the networks that are compared have to
be there. Of three repositories a file or folder has to be on the Python path:

    flax_example   google/flax, examples/imagenet/models.py, saved as flax_example_models.py
    bonsai         jax-ml/bonsai, the folder bonsai/
    maxvit         jax-ml/jax-ai-stack, docs/source/JAX_porting_PyTorch_model: `import torch` and
                   the cells that define the network, saved as maxvit_tutorial.py, with
                   `module.bias is not None` for `module.bias.value is not None`, which fails in
                   today's Flax
"""

import functools

CLASSES = 10


def _torchvision(name: str):
    import torchvision

    return getattr(torchvision.models, name)(num_classes=CLASSES)


resnet18 = functools.partial(_torchvision, "resnet18")
resnet50 = functools.partial(_torchvision, "resnet50")


def flax_example():
    """ResNet-18 of google/flax's ImageNet example, commit 18f8f311."""
    from flax_example_models import ResNet18

    return ResNet18(num_classes=CLASSES)


def bonsai():
    """ResNet-50 of jax-ml/bonsai, commit 3628425."""
    from bonsai.models.resnet.modeling import ModelConfig, ResNet
    from flax import nnx

    return ResNet(ModelConfig.resnet50(CLASSES), rngs=nnx.Rngs(0))


def jax_resnet():
    """ResNet-18 of jax-resnet 0.0.4."""
    from jax_resnet import ResNet18

    return ResNet18(n_classes=CLASSES)


def transformers():
    """FlaxResNetForImageClassification of transformers 4.57.6, with ResNet-18's sizes."""
    from transformers import FlaxResNetForImageClassification, ResNetConfig

    widths, depths = [64, 128, 256, 512], [2, 2, 2, 2]
    config = ResNetConfig(
        hidden_sizes=widths, depths=depths, layer_type="basic", num_labels=CLASSES
    )
    return FlaxResNetForImageClassification(config, input_shape=(1, 64, 64, 3))


def haiku():
    """hk.nets.ResNet18 of dm-haiku 0.0.17."""
    import haiku

    def forward(images, is_training):
        return haiku.nets.ResNet18(CLASSES)(images, is_training)

    return haiku.transform_with_state(forward)


def equinox():
    """ResNet-18 of the layers of Equinox 0.13.8 at their defaults, written here."""
    import equinox
    import jax

    from equivalence_tests.studies.equinox_resnet import ResNet18

    return equinox.nn.make_with_state(ResNet18)(CLASSES, jax.random.key(0))


def keras():
    """keras.applications.ResNet50 of Keras 3.15.1 on JAX (`KERAS_BACKEND=jax`), for 64 pixels."""
    import keras

    return keras.applications.ResNet50(
        weights=None, classes=CLASSES, classifier_activation=None, input_shape=(64, 64, 3)
    )


def flax_resnet():
    """ResNet-18 of this project."""
    from flax_resnet import create_model

    return create_model("resnet18", num_classes=CLASSES, kernels="library")


SMALL_VIT = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 32, "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip


def vit():
    """FlaxViTForImageClassification of transformers 4.57.6, three layers at 32 pixels."""
    from transformers import FlaxViTForImageClassification, ViTConfig

    return FlaxViTForImageClassification(ViTConfig(**SMALL_VIT))


def vit_torch():
    """ViTForImageClassification of transformers 4.57.6 of the same size, which returns logits."""
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(ViTForImageClassification):
        def forward(self, images):
            return super().forward(images).logits

    return Logits(ViTConfig(**SMALL_VIT, attn_implementation="eager"))


SMALL_MAXVIT = {
    "input_size": (56, 56), "stem_channels": 32, "block_channels": [32, 64],
    "block_layers": [2, 1], "head_dim": 32, "stochastic_depth_prob": 0.2, "partition_size": 7,
    "num_classes": CLASSES,
}  # fmt: skip


def maxvit():
    """MaxViT of the JAX AI Stack's tutorial on porting, commit 59de2e1, two stages at 56 pixels."""
    from maxvit_tutorial import MaxVit

    return MaxVit(**SMALL_MAXVIT)


def maxvit_torch():
    """torchvision's MaxViT of the same size."""
    from torchvision.models.maxvit import MaxVit

    return MaxVit(**SMALL_MAXVIT)
