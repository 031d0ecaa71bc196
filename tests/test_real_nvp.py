"""What is RealNVP's alone: the flow of pixels and its data transform, and the detector's likelihood and exports."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from conftest import SMALL, randomize

from anomalib_csflow import RealNVP
from anomalib_csflow.benchmark.run import accuracy, measure
from anomalib_csflow.flows import PixelFlow
from anomalib_csflow.flows.masked_coupling import MaskedCoupling


def pixel_flow(channels: int = 2, num_scales: int = 2) -> PixelFlow:
    """Small, with random parameters, in float64."""
    flow = PixelFlow(channels, num_scales=num_scales, hidden_channels=3, num_blocks=1)
    randomize(flow)
    return flow.double()  # type: ignore[return-value]


@pytest.mark.parametrize(("num_scales", "size"), [(1, (3, 5)), (2, (4, 6)), (3, (4, 4))])
def test_log_det_of_the_pixel_flow_is_that_of_its_jacobian(num_scales: int, size: tuple[int, int]) -> None:
    """With the dequantisation and the logit in it."""
    flow = pixel_flow(1, num_scales)
    images, noise = torch.rand(2, 1, *size).double(), torch.rand(2, 1, *size).double()
    latents, log_det = flow(images, noise)
    assert len(latents) == num_scales
    for sample in range(2):

        def flat(vector: torch.Tensor, sample: int = sample) -> torch.Tensor:
            outputs, _ = flow(vector.view(1, 1, *size), noise[sample : sample + 1], jac=False)
            return torch.cat([output.flatten() for output in outputs])

        jacobian = torch.autograd.functional.jacobian(flat, images[sample].flatten())
        torch.testing.assert_close(log_det[sample], torch.linalg.slogdet(jacobian).logabsdet)
    assert not flow(images, jac=False)[1].any()


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_inverse_of_the_pixel_flow(num_scales: int) -> None:
    flow = pixel_flow(2, num_scales)
    images = torch.rand(3, 2, 8, 12).double()
    latents, _ = flow(images)
    assert sum(latent[0].numel() for latent in latents) == images[0].numel()
    torch.testing.assert_close(flow.inverse(latents), images)


def test_images_of_the_pixel_flow_do_not_see_one_another() -> None:
    flow = pixel_flow()
    images = torch.rand(3, 2, 4, 4).double()
    torch.testing.assert_close(flow.nll(images), torch.cat([flow.nll(image[None]) for image in images]))
    torch.testing.assert_close(flow.train().nll(images), flow.eval().nll(images))


def test_likelihood_of_pixels_is_a_density_over_grey_levels() -> None:
    """It sums to 1 over all images of one pixel, so that bits per dimension are those of the literature."""
    flow = PixelFlow(1, num_scales=1, hidden_channels=3, num_blocks=1)
    randomize(flow, scale=0.5)
    images = torch.arange(256).view(-1, 1, 1, 1) / 255
    with torch.no_grad():
        total = torch.stack([(-flow.nll(images, torch.full_like(images, u))).exp() for u in np.arange(0.05, 1, 0.1)])
    # the logit of 0.05 to 0.95 leaves out the normal's tails, of which couplings move some
    inside = math.erf(math.log(19) / math.sqrt(2))
    assert total.mean(0).sum().item() == pytest.approx(inside, abs=0.05)


@pytest.mark.parametrize("size", [(5, 8), (8, 6)])
def test_odd_sizes_are_one_clear_error(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"images of .* cannot be halved 2 times: .* multiples of 4; resize or crop"):
        pixel_flow(1, 3).nll(torch.rand(1, 1, *size).double())


def test_masks_keep_what_they_say() -> None:
    images = torch.rand(1, 2, 4, 6)
    for mask, kept in (("halves", [(0, 0, 0), (0, 1, 0)]), ("checkerboard", [(0, 0, 0), (1, 1, 1)])):
        for swap in (False, True):
            coupling = MaskedCoupling(
                [(2, 4, 6)], conditioner=lambda i, o: torch.nn.Conv2d(i, o, 3, padding=1), mask=mask, swap=swap
            )
            (output,), _ = coupling((images,))
            same = (output == images)[0]
            assert same.float().mean() == 0.5
            assert all(bool(same[position]) is not swap for position in kept)


def test_score_is_the_exact_likelihood_per_feature() -> None:
    detector = RealNVP(**SMALL, image_size=96)
    randomize(detector.model.flow, scale=0.05)
    images = torch.rand(3, 3, 96, 96)
    with torch.no_grad():
        (embedding,) = detector.model.features(images)
        expected = detector.model.nll(images) / embedding.shape[1]
        torch.testing.assert_close(detector.model(images).pred_score, expected)
    assert detector.model(images).anomaly_map is None


def test_defaults_of_the_constructor() -> None:
    detector = RealNVP(weights="random", hidden_channels=8)  # the width alone is small
    assert detector.model.features.num_features == 1792
    assert [layer.swap for layer in detector.model.flow] == [False, True] * 4
    (group,) = detector.configure_optimizers()["optimizer"].param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-4, 5e-5)
    with pytest.raises(ValueError, match="num_blocks must be 2 or more"):
        RealNVP(num_blocks=1, weights="random")


@pytest.mark.slow
def test_training_finds_defects_and_the_export_agrees(datamodule: Folder, tmp_path: Path) -> None:
    import openvino

    detector = RealNVP(**SMALL, image_size=(96, 128))
    engine = Engine(max_epochs=8, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(detector, datamodule=datamodule)
    (metrics,) = engine.test(detector, datamodule=datamodule)
    assert metrics["image_AUROC"] == 1.0
    table = accuracy.evaluate(measure.predict(detector, datamodule, tmp_path))  # the table's cells for maps stay empty
    assert table["image_AUROC"] == 1.0
    assert math.isnan(table["pixel_AUROC"])
    assert math.isnan(table["AUPRO"])
    path = engine.export(RealNVP(**SMALL), ExportType.OPENVINO, tmp_path, ckpt_path=engine.best_model_path)
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert {next(iter(output.names)) for output in model.outputs} == {"pred_score", "pred_label"}
    images = next(iter(datamodule.test_dataloader())).image
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = detector.eval()(batch).pred_score
        np.testing.assert_allclose(model(batch.numpy())["pred_score"].reshape(-1), expected, atol=1e-3)
