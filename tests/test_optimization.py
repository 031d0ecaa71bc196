"""The schedules: laid out over the training, stretched on resuming."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import SMALL

from anomalib_csflow import CSFlow
from anomalib_csflow.engine import optimization
from anomalib_csflow.engine.optimization import NonFiniteLossError, TrainingOptions


def configured(options: TrainingOptions, num_steps: Callable[[], float]) -> dict[str, Any]:
    return optimization.optimizer_with_schedule([torch.nn.Parameter(torch.zeros(1))], options, num_steps)


def rates(schedule: str, steps: int) -> list[float]:
    """Learning rate of each step of a training."""
    setup = configured(TrainingOptions(2.0, schedule), lambda: steps)
    optimizer = setup["optimizer"]
    found = []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if "lr_scheduler" in setup and step < steps - 1:
            setup["lr_scheduler"]["scheduler"].step()
    return found


def test_schedules() -> None:
    assert rates("constant", 5) == [2.0] * 5
    cycle = rates("one_cycle", 20)
    assert max(cycle) == pytest.approx(2.0, rel=0.02)
    assert cycle[0] < 0.1
    assert cycle[-1] < 1e-3
    cosine = rates("warmup_cosine", 100)
    assert cosine[0] == pytest.approx(0.2)
    assert cosine[50] == pytest.approx(2 * 0.5005)
    assert cosine[-1] == pytest.approx(2e-3, rel=0.3)
    assert cosine[8:] == sorted(cosine[8:], reverse=True)
    steps = rates("warmup_steps", 100)
    assert steps[0] == pytest.approx(0.2)
    assert steps[12:70] == [2.0] * 58
    assert steps[70:] == pytest.approx([0.66] * 20 + [0.2178] * 10)


def test_schedules_are_stretched_on_resuming() -> None:
    options = TrainingOptions(2.0, "warmup_cosine")
    first = configured(options, lambda: 10)["lr_scheduler"]["scheduler"]
    second = configured(options, lambda: 20)["lr_scheduler"]["scheduler"]
    for scheduler in [first] * 10:
        scheduler.optimizer.step()
        scheduler.step()
    second.load_state_dict(first.state_dict())
    second.optimizer.step()
    second.step()
    assert second.get_last_lr()[0] == pytest.approx(rates("warmup_cosine", 20)[11])


def test_arguments_reach_adam() -> None:
    options = TrainingOptions(0.1, "constant", betas=[0.8, 0.8], eps=1e-4, weight_decay=1e-5)
    (group,) = configured(options, lambda: 1)["optimizer"].param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.8), 1e-4, 1e-5)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="schedule='one_cycle' needs the number of steps"):
        configured(TrainingOptions(1, "one_cycle"), lambda: float("inf"))
    with pytest.raises(ValueError, match="unknown schedule 'cosine': choose one of constant, one_cycle"):
        TrainingOptions(1, "cosine")
    with pytest.raises(ValueError, match="unknown optimizer 'sgd': choose one of adam, muon"):
        TrainingOptions(1, "constant", optimizer="sgd")


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(datamodule: Folder, tmp_path: Path) -> None:
    class Poisoned(CSFlow):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                with torch.no_grad():
                    next(self.model.flow.parameters()).fill_(float("nan"))

    detector = Poisoned(**SMALL, image_size=96)
    engine = Engine(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"the loss became nan at epoch 1, step 3: .*model\.ckpt") as error:
        engine.fit(detector, datamodule=datamodule)
    path = re.search(r"checkpoint: (\S+\.ckpt)", str(error.value))[1]
    kept = Poisoned.load_from_checkpoint(path)
    assert all(torch.isfinite(parameter).all() for parameter in kept.model.flow.parameters())


def test_gradient_clipping_is_the_papers_unless_asked(datamodule: Folder, tmp_path: Path) -> None:
    class Watched(CSFlow):
        norms: list[float] = []

        def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
            gradients = [p.grad for p in self.model.flow.parameters() if p.grad is not None]
            if gradients:
                self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    for asked, bound in ((None, 1.0), (0.01, 0.01)):
        Watched.norms = []
        detector = Watched(**SMALL | {"standardize": False}, image_size=96)
        engine = Engine(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, gradient_clip_val=asked)
        engine.fit(detector, datamodule=datamodule)
        assert Watched.norms
        assert max(Watched.norms) == pytest.approx(bound, rel=1e-2)


def test_non_finite_gradient_stops_before_the_step(datamodule: Folder, tmp_path: Path) -> None:
    class Exploding(CSFlow):
        def on_after_backward(self) -> None:
            if self.current_epoch == 1:
                next(self.model.flow.parameters()).grad.fill_(float("inf"))

    detector = Exploding(**SMALL, image_size=96)
    engine = Engine(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"the gradient became inf at epoch 1, step 3: .*model\.ckpt"):
        engine.fit(detector, datamodule=datamodule)
    assert all(torch.isfinite(parameter).all() for parameter in detector.model.flow.parameters())
