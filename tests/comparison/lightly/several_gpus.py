import pytorch_lightning as pl
import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform


class SimCLR(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet50()
        self.backbone.fc = torch.nn.Identity()
        self.projection_head = SimCLRProjectionHead(2048, 2048, 128)
        self.criterion = NTXentLoss(temperature=0.1, gather_distributed=True)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch, batch_index):
        (x0, x1), _, _ = batch
        return self.criterion(self.forward(x0), self.forward(x1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


dataset = LightlyDataset("photos/train", transform=SimCLRTransform())
dataloader = torch.utils.data.DataLoader(dataset, batch_size=256, shuffle=True, drop_last=True, num_workers=8)
trainer = pl.Trainer(max_epochs=100, devices="auto", strategy="ddp", sync_batchnorm=True)
trainer.fit(SimCLR(), dataloader)
