"""Large images in strips: the same maps, with less memory."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from anomalib_csflow.features import FrozenBackbone, FrozenLayers, strips
from anomalib_csflow.features.strips import InStrips, Strips
from anomalib_csflow.features.weights import create_backbone

DIVIDED = [
    ("tf_efficientnet_lite2", ["blocks.2", "blocks.4", "blocks.5"]),
    ("efficientnet_lite0", ["blocks.5"]),
    ("mobilenetv2_100", ["blocks.2", "blocks.3"]),
    ("tf_efficientnet_b0", ["blocks.2", "blocks.5"]),  # only between its squeeze-and-excitations
]


def divided(backbone: FrozenLayers) -> list[Strips]:
    """How the backbone's parts are divided."""
    (computed,) = backbone._computed
    return [module.strips for module in computed.modules() if isinstance(module, InStrips)]


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of small images."""
    monkeypatch.setattr(strips, "STRIP_VALUES", 2**14)


@pytest.mark.usefixtures("small_strips")
@pytest.mark.parametrize(("name", "layers"), DIVIDED)
@pytest.mark.parametrize("size", [(256, 256), (192, 352), (210, 130), (97, 256)])
def test_strips_give_the_same_maps(name: str, layers: list[str], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    backbone = FrozenLayers(create_backbone(name, "random"), layers)
    assert divided(backbone)
    images = torch.randn(2, 3, *size)
    whole = backbone.model(images)
    for level, expected in zip(backbone.maps(images), whole.values(), strict=True):
        torch.testing.assert_close(level, expected, atol=1e-5, rtol=1e-5)


def test_no_layer_holds_a_large_map(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = FrozenBackbone(create_backbone("tf_efficientnet_lite0", "random"), "blocks.4")
    largest = [0]

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del module, inputs
        largest[0] = max(largest[0], output.numel())

    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    image = torch.zeros(1, 3, 512, 512)
    backbone(image)
    assert largest[0] == 96 * 256 * 256  # 24 MiB of an image of 3: not worth dividing
    largest[0] = 0
    monkeypatch.setattr(strips, "STRIP_VALUES", 2**19)
    backbone(image)
    assert largest[0] <= 2 * 2**19  # what would make two strips is not divided


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("convnext_atto", "stages.2"),
        ("resnet18", "layer3"),
        ("vit_tiny_patch16_224", "blocks.3"),
    ],
)
def test_backbones_that_cannot_be_divided_stay_whole(name: str, layer: str) -> None:
    backbone = FrozenBackbone(create_backbone(name, "random"), layer)
    assert not divided(backbone)


def test_layers_that_see_the_whole_image_are_not_divided() -> None:
    class Attention(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps * maps.mean((2, 3), keepdim=True)

    def network(middle: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), middle, nn.Conv2d(32, 8, 3, 4, padding=1), nn.ReLU())

    assert divided(FrozenBackbone(network(nn.ReLU()), "3"))
    assert not divided(FrozenBackbone(network(nn.BatchNorm2d(32, track_running_stats=False)), "3"))
    assert not divided(FrozenBackbone(network(Attention()), "3"))
    circular = nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")  # its first rows see the last ones
    assert not divided(FrozenBackbone(network(circular), "3"))
    assert not divided(FrozenBackbone(network(nn.Conv2d(32, 32, 3, padding=65, dilation=65)), "3"))


class Skip(nn.Module):
    """A small map, to which the same is added after it was activated and widened."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 4, padding=1)
        self.activation = activation
        self.widen = nn.Conv2d(8, 128, 3, padding=1)
        self.narrow = nn.Conv2d(128, 8, 3, padding=1)
        self.end = nn.Identity()

    def forward(self, images: Tensor, unused: Tensor | None = None) -> Tensor:
        """Compute it."""
        maps = self.stem(images)
        return self.end(self.narrow(self.widen(self.activation(maps))) + maps)


@pytest.mark.usefixtures("small_strips")
@pytest.mark.parametrize(("activation", "expected"), [(nn.SiLU(), 1), (nn.SiLU(inplace=True), 0)])
def test_a_block_that_changes_its_input_stays_whole(activation: nn.Module, expected: int) -> None:
    torch.manual_seed(0)
    network = Skip(activation).eval()
    backbone = FrozenBackbone(network, "end")
    assert len(divided(backbone)) == expected
    images = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(backbone(images), network(images), atol=1e-5, rtol=1e-5)


def test_tensors_of_their_own_are_not_copied() -> None:
    class Scaled(Skip):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__(activation)
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, images: Tensor, unused: Tensor | None = None) -> Tensor:
            return super().forward(images * self.scale)

    backbone = FrozenBackbone(Scaled(nn.SiLU()), "end")
    assert not divided(backbone)
    assert backbone.double()(torch.randn(1, 3, 64, 64).double()).dtype == torch.float64


def test_steps_whose_result_nothing_uses_do_not_matter() -> None:
    class Checked(Skip):
        def forward(self, images: Tensor, unused: Tensor | None = None) -> Tensor:
            torch._assert(images.shape[1] == 3, "three channels")
            return super().forward(images)

    backbone = FrozenBackbone(Checked(nn.SiLU()), "end")
    assert len(divided(backbone)) == 1
    assert backbone(torch.randn(1, 3, 64, 64)).shape == (1, 8, 16, 16)


@pytest.mark.usefixtures("small_strips")
def test_strips_of_wide_images_are_higher_than_their_margins() -> None:
    heights: list[int] = []
    part = nn.Conv2d(3, 8, 3, padding=1)
    part.register_forward_hook(lambda *arguments: heights.append(arguments[1][0].shape[2]))
    images = torch.randn(1, 3, 64, 2048)
    found = InStrips(part, Strips(1, 4, 8.0))(images)
    assert sum(heights) < 1.5 * 64
    torch.testing.assert_close(found, part(images))


@pytest.mark.usefixtures("small_strips")
def test_copies_and_pickles_are_divided_and_share_their_modules() -> None:
    backbone = FrozenBackbone(create_backbone("tf_efficientnet_lite0", "random"), "blocks.2")
    images = torch.randn(1, 3, 128, 128)
    names = list(backbone.state_dict())
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):  # noqa: S301
        assert divided(other)
        assert list(other.state_dict()) == names
        torch.testing.assert_close(other(images), backbone(images), atol=0, rtol=0)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        assert not torch.allclose(other(images), backbone(images))  # computed with the parameters that have names
    doubled = backbone.double()
    assert doubled(images.double()).dtype == torch.float64
