"""Meta's checkpoints: params.json and consolidated.NN.pth."""
