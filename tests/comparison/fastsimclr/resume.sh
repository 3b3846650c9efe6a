fastsimclr train --data.train photos/train --epochs 100 --output runs/photos
