"""The definitions of the flow family, in plain PyTorch."""
