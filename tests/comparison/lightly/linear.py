import torch
from lightly.data import LightlyDataset
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking import LinearClassifier
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader
from torchvision import models
from torchvision import transforms as T

model = models.resnet50()
model.fc = torch.nn.Identity()
model.load_state_dict(torch.load("backbone.pt"))
finish = [T.ToTensor(), T.Normalize(**IMAGENET_NORMALIZE)]
augmented = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *finish])
centered = T.Compose([T.Resize(256), T.CenterCrop(224), *finish])
train = DataLoader(LightlyDataset("photos/train", transform=augmented), batch_size=256, shuffle=True, num_workers=8)
val = DataLoader(LightlyDataset("photos/val", transform=centered), batch_size=256)
classifier = LinearClassifier(model, batch_size_per_device=256, feature_dim=2048, num_classes=2, topk=(1,))
Trainer(max_epochs=90).fit(classifier, train, val)
