"""Kernel-accelerated Pyramid Attention Broadcast for video diffusion transformers."""
