from torchvision.datasets import ImageFolder

from fastsimclr import pretrain

pretrain(ImageFolder("photos/train"), "resnet50", epochs=100, output="runs/dataset")
