import torch
from solo.losses.simclr import simclr_loss_func

loss = simclr_loss_func(torch.cat([z1, z2]), indexes=torch.arange(len(z1)).repeat(2), temperature=0.5)
