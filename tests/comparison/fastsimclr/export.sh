fastsimclr export --checkpoint runs/photos --format torchvision --output encoder.pt
