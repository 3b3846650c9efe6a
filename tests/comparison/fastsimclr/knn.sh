fastsimclr evaluate knn --checkpoint runs/photos --data.val photos/val
