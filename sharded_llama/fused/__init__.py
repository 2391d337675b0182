"""What takes several kernels of the compiler's, as one kernel of our own each, for NVIDIA GPUs."""
