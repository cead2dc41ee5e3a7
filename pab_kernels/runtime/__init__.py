"""What runs a denoising step: executor, slots, cache, graphs, workspace, fp8 choice, and the handle that owns them."""
