"""An encoder whose training step takes milliseconds: --model.encoder=.../tiny.py:Tiny."""

from torch import Tensor, nn


class Tiny(nn.Sequential):
    """Two convolutions with batch normalization, and the mean over the pixels: 16 features."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.BatchNorm2d(16),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = super().forward(images)
        return features
