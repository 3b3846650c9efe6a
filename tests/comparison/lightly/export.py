torch.save(backbone.state_dict(), "encoder.pt")
