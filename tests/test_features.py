"""Backbones: any layer, any size, frozen, and nothing beyond the layer."""

from itertools import pairwise

import pytest
import timm
import torch

from anomalib_csflow.features import FrozenBackbone, FrozenLayers, ImagePyramid, LayerPyramid, PooledPyramid
from anomalib_csflow.features.weights import create_backbone

BACKBONES = [
    ("tf_efficientnet_lite0", "blocks.5", 192, 32),
    ("tf_efficientnet_lite0", "blocks.4.1", 112, 16),
    ("resnet18.tv_in1k", "layer2", 128, 8),
    ("mobilenetv3_small_100", "blocks.3", 48, 16),
    ("convnext_atto", "stages.2", 160, 16),
    ("torchvision/resnet18", "layer3.0", 256, 16),
    ("vit_tiny_patch16_224", "blocks.3", 192, 16),
    ("vit_small_patch14_dinov2.lvd142m", "blocks.2", 384, 14),
]


@pytest.mark.parametrize(("name", "layer", "channels", "stride"), BACKBONES)
def test_any_backbone_and_layer(name: str, layer: str, channels: int, stride: int) -> None:
    pyramid = ImagePyramid(FrozenBackbone(create_backbone(name, "random"), layer), num_scales=3)
    assert pyramid.channels == [channels] * 3
    assert pyramid.min_size == 4 * stride
    maps = pyramid(torch.rand(1, 3, 230, 300))
    for finer, coarser in pairwise(maps):
        for f, c in zip(finer.shape[2:], coarser.shape[2:], strict=True):
            assert c in {f // 2, (f + 1) // 2}
    assert [level.shape[1] for level in maps] == pyramid.channels


def test_only_the_part_up_to_the_layer_is_kept() -> None:
    whole = create_backbone("tf_efficientnet_lite0", "package")
    size = sum(parameter.numel() for parameter in whole.parameters())
    expected = []
    hook = whole.blocks[4].register_forward_hook(lambda *arguments: expected.append(arguments[2]))
    images = torch.rand(2, 3, 128, 96)
    whole.eval()(images)
    hook.remove()
    backbone = FrozenBackbone(whole, "blocks.4")
    torch.testing.assert_close(backbone(images), expected[0], atol=1e-5, rtol=1e-4)
    assert sum(parameter.numel() for parameter in backbone.parameters()) < size / 4


def test_transformer_tokens_are_folded_to_the_map_of_their_block() -> None:
    whole = create_backbone("vit_tiny_patch16_224", "random").eval()
    images = torch.rand(1, 3, 224, 224)
    (expected,) = whole.forward_intermediates(images, indices=[3], norm=False, intermediates_only=True)
    backbone = FrozenBackbone(whole, "blocks.3")
    torch.testing.assert_close(backbone(images), expected)
    assert len(backbone.model.blocks) == 4


def test_frozen_through_train() -> None:
    backbone = FrozenBackbone(create_backbone("resnet18.tv_in1k", "random"), "layer1")
    before = backbone(torch.ones(2, 3, 64, 64))
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    backbone(5 * torch.rand(4, 3, 64, 64))
    torch.testing.assert_close(backbone(torch.ones(2, 3, 64, 64)), before)


def test_pyramid_is_the_backbone_at_halved_images() -> None:
    backbone = FrozenBackbone(create_backbone("tf_efficientnet_lite0", "package"), "blocks.4")
    images = torch.rand(2, 3, 128, 192)
    maps = ImagePyramid(backbone, num_scales=2)(images)
    torch.testing.assert_close(maps[0], backbone(images))
    torch.testing.assert_close(maps[1], backbone(images[..., ::2, ::2]), atol=1e-5, rtol=1e-4)


def test_unknown_layer_lists_near_names() -> None:
    with pytest.raises(ValueError, match=r"no layer 'block\.4'; near names are .*blocks\.4"):
        FrozenBackbone(timm.create_model("tf_efficientnet_lite0"), "block.4")
    with pytest.raises(ValueError, match="name a block"):
        FrozenBackbone(create_backbone("vit_tiny_patch16_224", "random"), "patch_embed")
    with pytest.raises(ValueError, match="not a map"):
        FrozenBackbone(create_backbone("resnet18.tv_in1k", "random"), "fc")
    with pytest.raises(ValueError, match="cannot be used"):  # this one runs at its pretraining's size alone
        FrozenBackbone(create_backbone("swin_tiny_patch4_window7_224", "random"), "layers.1")


def test_too_small_an_image_says_the_least_size() -> None:
    pyramid = ImagePyramid(FrozenBackbone(create_backbone("tf_efficientnet_lite0", "random"), "blocks.5"), 3)
    pyramid(torch.zeros(1, 3, 128, 128))
    with pytest.raises(ValueError, match=r"image of 200x127 pixels is too small .* least size is 128x128"):
        pyramid(torch.zeros(1, 3, 200, 127))
    with pytest.raises(ValueError, match="num_scales must be 1 or more"):
        ImagePyramid(pyramid.backbone, 0)


def test_pooled_pyramid_is_the_average_of_each_map() -> None:
    backbone = FrozenBackbone(create_backbone("tf_efficientnet_lite0", "package"), "blocks.4")
    images = torch.rand(2, 3, 130, 190)
    pooled = PooledPyramid(backbone, num_scales=2)
    (vector,) = pooled(images)
    expected = [level.mean((2, 3)) for level in ImagePyramid(backbone, num_scales=2)(images)]
    torch.testing.assert_close(vector, torch.cat(expected, dim=1))
    assert vector.shape == (2, pooled.num_features)
    torch.testing.assert_close(pooled(images[1:])[0], vector[1:])


def test_least_size_of_a_backbone_that_does_not_pad() -> None:
    """AlexNet's poolings need 63 pixels for one position at stride 32, and its maps do not halve."""
    pyramid = PooledPyramid(FrozenBackbone(create_backbone("torchvision/alexnet", "random"), "features.12"), 3)
    assert pyramid.num_features == 3 * 256
    assert pyramid(torch.zeros(1, 3, 252, 448))[0].shape == (1, 768)
    with pytest.raises(ValueError, match="the least size is 252x252"):
        pyramid(torch.zeros(1, 3, 251, 448))


@pytest.mark.parametrize(
    ("name", "layers", "channels", "strides"),
    [
        ("resnet18.tv_in1k", ["layer1", "layer2", "layer3"], [64, 128, 256], [4, 8, 16]),
        ("tf_efficientnet_lite0", ["blocks.2", "blocks.4", "blocks.6"], [40, 112, 320], [8, 16, 32]),
        ("torchvision/resnet18", ["layer1.0", "layer3"], [64, 256], [4, 16]),
        ("inception_v4", ["features.3", "features.10"], [160, 1024], [4, 16]),
        ("vit_tiny_patch16_224", ["blocks.1", "blocks.3"], [192, 192], [16, 16]),
    ],
)
def test_several_layers_in_one_pass(name: str, layers: list[str], channels: list[int], strides: list[int]) -> None:
    pyramid = LayerPyramid(FrozenLayers(create_backbone(name, "random"), layers))
    assert (pyramid.channels, pyramid.strides, pyramid.min_size) == (channels, strides, strides[-1])
    images = torch.rand(1, 3, 230, 300)
    maps = pyramid(images)
    assert [level.shape[1] for level in maps] == channels
    assert not any(parameter.requires_grad for parameter in pyramid.parameters())
    calls = []
    pyramid.backbone.model.register_forward_pre_hook(lambda *_: calls.append(1))
    pyramid(images)
    assert len(calls) <= 1


def test_layers_are_those_of_the_whole_model() -> None:
    whole = create_backbone("tf_efficientnet_lite0", "package").eval()
    kept: dict[str, torch.Tensor] = {}
    hooks = [
        whole.get_submodule(layer).register_forward_hook(lambda *a, layer=layer: kept.update({layer: a[2]}))
        for layer in ("blocks.2", "blocks.4")
    ]
    images = torch.rand(2, 3, 128, 96)
    whole(images)
    for hook in hooks:
        hook.remove()
    size = sum(parameter.numel() for parameter in whole.parameters())
    pyramid = LayerPyramid(FrozenLayers(whole, list(kept)))
    torch.testing.assert_close(pyramid(images), tuple(kept.values()), atol=1e-5, rtol=1e-4)
    assert sum(parameter.numel() for parameter in pyramid.parameters()) < size / 4


def test_final_norm_of_a_transformer() -> None:
    whole = create_backbone("vit_tiny_patch16_224", "random").eval()
    images = torch.rand(1, 3, 224, 224)
    (expected,) = whole.forward_intermediates(images, indices=[3], norm=True, intermediates_only=True)
    (found,) = LayerPyramid(FrozenLayers(whole, ["blocks.3"], final_norm=True))(images)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.mean(1), torch.zeros(1, 14, 14), atol=1e-4, rtol=0)


def test_what_features_are_is_told_apart() -> None:
    """The feature cache keeps features under this, and under the weights."""
    backbones = [
        FrozenLayers(create_backbone("vit_tiny_patch16_224", "random"), layers, final_norm=norm)
        for layers, norm in ((["blocks.1"], False), (["blocks.1"], True), (["blocks.0", "blocks.1"], False))
    ]
    assert len({LayerPyramid(backbone).extra_repr() for backbone in backbones}) == 3


def test_a_transformer_of_one_size() -> None:
    backbone = create_backbone("cait_xxs24_224", "random")
    pyramid = LayerPyramid(FrozenLayers(backbone, ["blocks.1"], final_norm=True))
    assert pyramid(torch.rand(1, 3, 224, 224))[0].shape == (1, 192, 14, 14)
    with pytest.raises(ValueError, match=r"cannot take an image of 256x224 pixels: .* set image_size=224"):
        pyramid(torch.rand(1, 3, 256, 224))
    with pytest.raises(ValueError, match="images of 224 pixels only: set num_scales=1"):
        ImagePyramid(FrozenBackbone(create_backbone("cait_xxs24_224", "random"), "blocks.1"))


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("resnet18", ["layer2", "layer1"], r"from fine to coarse: .* have strides \[8, 4\]"),
        ("resnet18", [], "name one or more layers, each only once"),
        ("resnet18", ["layer1", "layer1"], "name one or more layers, each only once"),
        ("resnet18", ["layer1", "layer9"], "no layer 'layer9'; near names are"),
        ("vit_tiny_patch16_224", ["blocks.3", "blocks.1"], "blocks in order"),
    ],
)
def test_layers_that_make_no_pyramid(name: str, layers: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerPyramid(FrozenLayers(create_backbone(name, "random"), layers))


def test_few_at_once_gives_the_same_maps() -> None:
    pyramid = ImagePyramid(FrozenBackbone(create_backbone("tf_efficientnet_lite0", "random"), "blocks.2"), num_scales=2)
    images = torch.rand(7, 3, 64, 96)
    seen: list[int] = []
    pyramid.backbone.register_forward_hook(lambda *arguments: seen.append(len(arguments[2])))
    for found, expected in zip(pyramid.few_at_once(images), pyramid(images), strict=True):
        torch.testing.assert_close(found, expected)
    number = max(torch.get_num_threads(), 2)
    assert max(seen[:-2]) == min(number, 7)
    assert sum(seen[:-2]) == 2 * 7
