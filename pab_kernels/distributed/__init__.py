"""Several GPUs: which rank holds what, and how what it holds comes to the others.

The mesh of ranks, the exchange between them, what they share beside it and how they are started, on torch.distributed
and multiprocessing; no block, no slot, no schedule. A file here may import the settings, `ops`, `blocks` and `models`,
never the runtime, which it serves."""
