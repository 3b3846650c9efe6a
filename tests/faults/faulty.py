"""An encoder that fails on FAULT_RANK: --model.encoder=.../faulty.py:Faulty. FAULT is raise, hang or slow."""

import os
import time

from torch import Tensor, nn


class Faulty(nn.Sequential):
    """It is made slowly, or its third training step raises or hangs."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fault = os.environ["FAULT"] if os.environ["RANK"] == os.environ["FAULT_RANK"] else ""
        self.steps = 0
        if self.fault == "slow":
            time.sleep(float(os.environ["SECONDS"]))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        if self.steps == 3 and self.fault == "raise":
            raise RuntimeError("a fault of rank " + os.environ["RANK"])
        if self.steps == 3 and self.fault == "hang":
            print("in the third step", flush=True)
            time.sleep(1000)
        features: Tensor = super().forward(images)
        return features
