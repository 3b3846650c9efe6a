import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torchvision.datasets import ImageFolder


class SimCLR(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(2048, 2048, 128)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


backbone = torchvision.models.resnet50()
backbone.fc = torch.nn.Identity()
model = SimCLR(backbone).to("cuda")
dataset = LightlyDataset.from_torch_dataset(ImageFolder("photos/train"), transform=SimCLRTransform())
dataloader = torch.utils.data.DataLoader(dataset, batch_size=256, shuffle=True, drop_last=True, num_workers=8)
criterion = NTXentLoss(temperature=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
for epoch in range(100):
    for (x0, x1), _, _ in dataloader:
        loss = criterion(model(x0.to("cuda")), model(x1.to("cuda")))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
torch.save(backbone.state_dict(), "backbone.pt")
