from lightly.loss import NTXentLoss

loss = NTXentLoss(temperature=0.5)(z1, z2)
