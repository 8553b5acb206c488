"""fastreg: fast, exact regularisation for PyTorch training."""
