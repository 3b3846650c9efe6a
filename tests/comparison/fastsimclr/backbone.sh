fastsimclr train --data.train photos/train --model.encoder timm/convnext_tiny --epochs 100 --output runs/convnext
