"""Several GPUs: which rank holds what, and how what it holds comes to the others.

The mesh of ranks and the exchange between them, on torch.distributed; no block, no slot, no schedule. A file here may
import the settings, `ops`, `blocks` and `models`, never the runtime, which it serves."""
