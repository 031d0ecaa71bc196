"""The same numbers as the published code, and as anomalib's Csflow from its trained weights."""

from pathlib import Path

import pytest
import torch
from anomalib.models import Csflow
from conftest import SMALL, randomize
from torch import nn
from torchvision.models import WeightsEnum

from anomalib_csflow import CSFlow, scoring
from anomalib_csflow.detectors.cs_flow.reference import convert_reference_flow
from anomalib_csflow.detectors.differ_net.reference import convert_reference_flow as convert_differ_net
from anomalib_csflow.flows import CrossScaleCoupling, GlowCoupling, PyramidFlow, ScalePermutation


@pytest.fixture
def golden(test_data: Path) -> dict:
    """Tensors made by running the authors' code."""
    return torch.load(test_data / "golden" / "cs_flow.pt", weights_only=True)


def published_flow(golden: dict) -> PyramidFlow:
    """Our flow with the authors' weights."""
    config = golden["config"]
    dims = [(config["channels"], *size) for size in config["map_sizes"]]
    layers: list[nn.Module] = []
    for block, kernel_size in enumerate(config["kernel_sizes"]):
        layers.append(ScalePermutation(dims, seed=block))
        layers.append(
            CrossScaleCoupling(
                dims, hidden_channels=config["hidden_channels"], kernel_size=kernel_size, clamp=config["clamp"]
            )
        )
    flow = PyramidFlow(layers)
    flow.load_state_dict(convert_reference_flow(golden["state_dict"], golden["permutations"]))
    return flow


def test_published_code(golden: dict) -> None:
    flow = published_flow(golden)
    latents, log_det = flow(golden["inputs"])
    torch.testing.assert_close(list(latents), list(golden["latents"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_det, golden["log_det"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scoring.mean_energy(latents), golden["anomaly_score"], atol=1e-5, rtol=1e-5)

    loss = (scoring.energy(latents) - log_det).mean() / scoring.num_dims(latents)
    torch.testing.assert_close(loss, golden["loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    # the golden file holds the gradients of some parameters: the others' stay zero here
    padded = {name: torch.zeros_like(tensor) for name, tensor in golden["state_dict"].items()} | golden["grads"]
    published = convert_reference_flow(padded, golden["permutations"])
    compared = 0
    for name, parameter in flow.named_parameters():
        if published[name].any():
            torch.testing.assert_close(parameter.grad, published[name], atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared == len(golden["grads"]) - 2  # the three gammas are one parameter of ours


def test_permutations_are_those_that_the_authors_draw(golden: dict) -> None:
    drawn = convert_reference_flow(golden["state_dict"])
    given = convert_reference_flow(golden["state_dict"], golden["permutations"])
    flow = published_flow(golden)
    seeded = ScalePermutation([(12, 8, 12), (12, 4, 6), (12, 2, 3)], seed=1)
    for scale in range(3):
        assert torch.equal(drawn[f"2.permutation_{scale}"], given[f"2.permutation_{scale}"])
        assert torch.equal(seeded.get_buffer(f"permutation_{scale}"), flow[2].get_buffer(f"permutation_{scale}"))


def test_published_differnet(test_data: Path) -> None:
    golden = torch.load(test_data / "golden" / "differnet.pt", weights_only=True)
    config = golden["config"]
    dims = [(config["features"],)]
    layers: list[nn.Module] = []
    for block in range(config["n_coupling_blocks"]):
        coupling = GlowCoupling(dims, hidden_features=config["hidden"], clamp=config["clamp"])
        layers += [ScalePermutation(dims, seed=block), coupling]
    flow = PyramidFlow(layers)
    drawn = dict(flow.named_buffers())
    converted = convert_differ_net(golden["state_dict"], golden["permutations"])
    for name, permutation in drawn.items():  # seeded as the published ones
        assert torch.equal(permutation, converted[name])
    assert converted.keys() == convert_differ_net(golden["state_dict"]).keys()
    flow.load_state_dict(converted)
    latents, log_det = flow((golden["inputs"],))
    torch.testing.assert_close(latents[0], golden["latents"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_det, golden["log_det"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(2 * scoring.mean_energy(latents), golden["score"], atol=1e-5, rtol=1e-5)
    loss = (scoring.energy(latents) - log_det).mean() / scoring.num_dims(latents)
    torch.testing.assert_close(loss, golden["loss"], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def anomalib_csflow() -> Csflow:
    """Anomalib's model, small, with random weights everywhere and batch-norm statistics that fit them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: None)
    patch.setattr(nn.Module, "load_state_dict", _skip_none(nn.Module.load_state_dict))
    model = Csflow(cross_conv_hidden_channels=8, n_coupling_blocks=2)
    patch.undo()
    randomize(model.model.graph, scale=0.02)
    for name, parameter in model.model.graph.named_parameters():
        if "gamma" in name:
            parameter.data.uniform_(0.3, 0.6)
    # random weights without this would give constant features, and prove nothing
    backbone = model.model.feature_extractor.feature_extractor.feature_extractor
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        backbone(torch.randn(4, 3, 256, 256))
    return model.eval()


def _skip_none(load):  # noqa: ANN001, ANN202
    return lambda self, state, *args, **kwargs: None if state is None else load(self, state, *args, **kwargs)


def test_weights_of_anomalibs_csflow(anomalib_csflow: Csflow) -> None:
    ours = CSFlow(
        "torchvision/efficientnet_b5", "features.6.8", "random", image_size=256, num_blocks=2, hidden_channels=8
    ).eval()
    ours.load_reference_state_dict(anomalib_csflow.state_dict())
    images = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        features = ours.model.features(images)
        latents, log_det = ours.model.flow(features)
        expected, batch_log_det = anomalib_csflow.model.graph(list(anomalib_csflow.model.feature_extractor(images)))
        torch.testing.assert_close(list(latents), list(expected), atol=1e-4, rtol=1e-4)
        # anomalib sums over the batch
        torch.testing.assert_close(log_det.sum().expand(2), batch_log_det, atol=1e-2, rtol=1e-4)
        torch.testing.assert_close(
            ours.model(images).pred_score, anomalib_csflow.model(images).pred_score, atol=1e-4, rtol=1e-4
        )
    assert latents[0].std() > 0.1
    assert not torch.equal(latents[0], features[0])


def test_reference_weights_that_do_not_fit(anomalib_csflow: Csflow) -> None:
    detector = CSFlow(**SMALL, image_size=128)
    with pytest.raises(ValueError, match="use the number of blocks, channels and kernel sizes"):
        detector.load_reference_state_dict(anomalib_csflow.state_dict())
    with pytest.raises(ValueError, match="there is no CS-Flow in these weights"):
        detector.load_reference_state_dict({"conv1.weight": torch.zeros(3)})
