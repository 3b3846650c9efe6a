"""Cosine filters in the first convolution: a discrete cosine transform, in the order of the variance in images."""

from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from sklearn.datasets import load_sample_images
from weights import images

from fastsimclr import UserError, encoder, load_encoder
from fastsimclr.models import cosine_filters
from fastsimclr.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("channels", "size"), [(3, 7), (3, 3), (1, 5), (4, 2)])
def test_are_all_filters_of_scipys_transform(channels: int, size: int) -> None:
    number = channels * size**2
    filters = cosine_filters(2 * number, channels, size)
    assert torch.equal(filters[number:], -filters[:number])
    coefficients = scipy.fft.dctn(filters[:number].double().numpy(), axes=(1, 2, 3), norm="ortho").reshape(number, -1)
    which = np.abs(coefficients).argmax(axis=1)
    assert sorted(which) == list(range(number))
    assert np.abs(coefficients - np.eye(number)[which]).max() < 1e-6


def test_begin_with_the_mean_and_the_edges() -> None:
    mean, along_x, along_y = cosine_filters(3, 3, 7)
    assert torch.allclose(mean, torch.full((3, 7, 7), (3 * 49) ** -0.5))
    assert torch.allclose(along_x, along_x[:1, :1].expand(3, 7, 7))  # the same in each channel and row
    assert torch.allclose(along_y, along_y[:1, :, :1].expand(3, 7, 7))
    assert (along_x.diff(dim=2) < 0).all()
    assert (along_y.diff(dim=1) < 0).all()


@pytest.mark.parametrize("size", [5, 7])
def test_hold_nearly_the_variance_of_principal_components(size: int) -> None:
    photos = torch.from_numpy(np.stack(load_sample_images().images)).movedim(3, 1).double()
    patches = torch.nn.functional.unfold(photos, size, stride=4).mT.flatten(0, 1)
    covariance = patches.mT.cov()
    count = 3 * size**2 // 4
    filters = cosine_filters(count, 3, size).double().flatten(1)
    held = (filters @ covariance @ filters.mT).trace()
    best = torch.linalg.eigvalsh(covariance)[-count:].sum()
    assert 0.995 * best < held <= best


def test_only_our_resnets_take_them() -> None:
    with pytest.raises(UserError, match=r"got dct for timm/test_vit, expected it with resnet10, .*resnet152 only"):
        encoder("timm/test_vit", image_size=160, weights="dct")
    with pytest.raises(UserError, match="got dct for 64 filters of 3 x 3 x 3, expected at most 54: use"):
        encoder("resnet18", stem="small", weights="dct")
    made = encoder("resnet18", 0.5, "small", channels=5, weights="dct")
    assert torch.equal(made.conv1.weight, cosine_filters(32, 5, 3))


@pytest.mark.slow
def test_a_run_keeps_them_where_conv1_is_frozen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config=cifar10_fast", "--data.train=digits", "--batch_size=64", "--device=cpu", "--precision=fp32"]
    assert main([*options, "--max_steps=2", "--knn_every=0", f"--output={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "weights: 32 cosine filters in conv1, and random ones elsewhere" in said
    assert "(frozen: conv1)" in said
    trained, start = load_encoder(tmp_path / "run"), encoder("resnet10", 0.5, "medium", weights="dct")
    assert torch.equal(trained.conv1.weight, start.conv1.weight)
    assert not torch.equal(trained.bn1.running_var, start.bn1.running_var)
    assert not torch.equal(trained.layer1[0].conv1.weight, start.layer1[0].conv1.weight)
    assert trained(images(2, 3, 32, 32)).shape == (2, 256)
