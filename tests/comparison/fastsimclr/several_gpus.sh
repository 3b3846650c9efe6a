torchrun --nproc-per-node 8 -m fastsimclr.train --data.train photos/train --epochs 100 --output runs/photos
