"""Triton kernels, one file a family. Installed as `genfuse.kernels`; imported only where Triton is."""
