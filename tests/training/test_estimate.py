"""The estimate of a step's time and memory on a CPU, and what is printed about it."""

import math
from dataclasses import replace

import pytest
import torch

from fastsimclr import Augmentation, NTXentLoss, SimCLR, encoder, projector
from fastsimclr.config import Config
from fastsimclr.precision import Precision
from fastsimclr.training.estimate import Estimate, estimate_step
from fastsimclr.training.summary import describe_estimate

FP32 = Precision(None, torch.float32, "fp32")


def test_estimate_does_not_change_the_model_or_the_random_state(one_thread: None) -> None:
    model = SimCLR(encoder("resnet18", width=0.25), projector(128))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    found = estimate_step(model, NTXentLoss(), FP32, Augmentation(image_size=64), batch_size=8)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.step_seconds > 0


@pytest.mark.parametrize("num_views", [2, 3])
def test_activation_bytes_are_those_that_autograd_saves(one_thread: None, num_views: int) -> None:
    """One linear layer saves its input for the gradient of its weight, and nothing else."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
    found = estimate_step(model, NTXentLoss(), FP32, Augmentation(image_size=32, num_views=num_views), batch_size=4)
    assert found.activation_bytes == pytest.approx(num_views * 3 * 32 * 32 * 4, rel=0.01)  # float32; and the loss's


def test_advice_is_printed_only_where_it_is_needed() -> None:
    config = Config()
    (line,) = describe_estimate(config, Estimate(2.0, 1e6), 100)
    assert line == "estimate: 2.0 s per step, 3 min 20 s for 100 steps"
    _, long = describe_estimate(config, Estimate(100.0, 1e6), 1000)
    assert long.endswith("e.g. --model.encoder resnet18 --data.image_size 96 --epochs 10")
    _, long = describe_estimate(replace(config, epochs=5), Estimate(100.0, 1e6), 1000)
    assert "--epochs" not in long


def test_micro_batch_size_is_recommended_that_fits_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 16, "SC_PAGE_SIZE": 2**30}.__getitem__)
    _, line = describe_estimate(Config(), Estimate(1.0, 2**30 / 4), 10)
    assert line == "activations will need about 64 GiB, but this machine has 16 GiB: use --micro_batch_size 32"
    assert math.isclose(32 * 2**30 / 4, 16 * 2**30 / 2)
    assert len(describe_estimate(Config(micro_batch_size=32), Estimate(1.0, 2**30 / 4), 10)) == 1
