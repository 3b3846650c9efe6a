from fastsimclr import nt_xent

loss = nt_xent(z1, z2, temperature=0.5)
