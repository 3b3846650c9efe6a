fastsimclr evaluate linear --checkpoint runs/photos --data.val photos/val
