"""Muon: orthogonal steps for matrices, Adam's for the rest, and a state that is restored."""

import copy
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import SMALL
from torch import nn

from anomalib_csflow import CSFlow
from anomalib_csflow.engine import muon
from anomalib_csflow.engine.muon import UPDATE_RMS, Muon, is_matrix, orthogonalized


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of a processor that multiplies bfloat16, and of one that does not."""
    monkeypatch.setattr(muon, "computes_bfloat16", lambda _: request.param)
    return torch.bfloat16 if request.param else torch.float32


@pytest.mark.parametrize("shape", [(8, 50), (50, 8), (16, 16)], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_singular_vectors_stay_and_values_become_one(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(0, -1, shape[1])
    found = orthogonalized(matrix * scale)
    assert found.dtype == dtype
    found = found.float()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.linalg.svdvals(found) == pytest.approx(torch.ones(min(shape)), abs=0.45)
    aligned = torch.einsum("mk,mn,kn->k", u, found, v)  # the singular values, if the vectors are the same
    assert aligned == pytest.approx(torch.linalg.svdvals(found).numpy().mean(), abs=0.45)


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nothing_from_no_gradient(given: torch.dtype) -> None:
    assert orthogonalized(torch.zeros(4, 6, dtype=given)).abs().max() == 0


def test_what_is_a_matrix() -> None:
    flow = CSFlow(**SMALL).model.flow
    found = {name for name, parameter in flow.named_parameters() if is_matrix(parameter)}
    assert found == {
        f"{name}.weight" for name, module in flow.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    assert not is_matrix(torch.zeros(1, 5, 1, 1))  # one number per channel, as in an activation normalization
    assert not is_matrix(torch.zeros(5, 1, 1))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 9, 4))


def step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    network(torch.randn(16, 3, 5, 5)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_steps(fused: bool) -> None:
    network = layers()
    before, options = copy.deepcopy(network.state_dict()), {"lr": 0.1, "fused": fused}
    step(network, Muon(network.parameters(), **options), seed=1)
    moved = {name: value - before[name] for name, value in network.state_dict().items()}
    by_adam = layers()
    step(by_adam, torch.optim.Adam(by_adam.parameters(), **options), seed=1)
    for name, value in by_adam.state_dict().items():
        is_bias = name.endswith("bias")
        assert torch.equal(value, network.state_dict()[name]) == is_bias
        if not is_bias:
            assert moved[name].square().mean().sqrt() == pytest.approx(0.1 * UPDATE_RMS, rel=0.3)


def test_the_order_in_which_a_weight_is_stored_does_not_matter() -> None:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network = layers().to(memory_format=memory_format)
        optimizer = Muon(network.parameters(), lr=0.1)
        for seed in range(3):
            step(network, optimizer, seed)
        found.append(network[0].weight)
    assert torch.allclose(found[0], found[1], atol=1e-3)


def test_a_restored_state_goes_on_alike() -> None:
    network = layers()
    optimizer = Muon(network.parameters(), lr=0.1)
    for seed in range(3):
        step(network, optimizer, seed)
    restored = layers()
    restored.load_state_dict(network.state_dict())
    other = Muon(restored.parameters(), lr=0.3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((network, optimizer), (restored, other)):
        step(each, its, seed=9)
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_closure_is_called_once() -> None:
    network, calls = layers(), []
    optimizer = Muon(network.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = network(torch.randn(2, 3, 5, 5)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == [1]


def test_needs_fewer_steps_than_adam(datamodule: Folder, tmp_path: Path) -> None:
    """On real training images, from the same start and with the same learning rate."""
    losses = {}
    options = {"standardize": True, "lr": 5e-3, "schedule": "one_cycle", "max_steps": 20}
    for name in ("adam", "muon"):
        torch.manual_seed(0)
        detector = CSFlow(**SMALL | options, optimizer=name)
        engine = Engine(default_root_dir=tmp_path / name, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
        engine.fit(detector, datamodule=datamodule)
        losses[name] = float(engine.trainer.callback_metrics["train_loss_epoch"])
    assert losses["muon"] < losses["adam"] - 0.01
