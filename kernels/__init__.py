"""Token statistics under an LM head and their gradients: Triton kernels and their torch twin. See dispatch.py."""
