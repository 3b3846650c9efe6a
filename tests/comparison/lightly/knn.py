import torch
from lightly.data import LightlyDataset
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking import KNNClassifier
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader
from torchvision import models
from torchvision import transforms as T

model = models.resnet50()
model.fc = torch.nn.Identity()
model.load_state_dict(torch.load("backbone.pt"))
steps = [T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(**IMAGENET_NORMALIZE)]
datasets = [LightlyDataset(f"photos/{part}", transform=T.Compose(steps)) for part in ("train", "val")]
loaders = [DataLoader(dataset, batch_size=256) for dataset in datasets]
classifier = KNNClassifier(model, 2, knn_k=20, knn_t=0.1, train_dataloader_idx=0, val_dataloader_idx=1, topk=(1,))
Trainer(max_epochs=1).validate(classifier, loaders)
