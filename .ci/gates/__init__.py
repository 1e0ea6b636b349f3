"""What can be said about the CUDA kernels without a device: compiled for every architecture, and looked at."""
