"""What runs a denoising step: slots, executor, graphs, and the handle that owns them.

All state of a run is here: which slots there are and what they hold (`plan`, `slots`, `cache`), the vectors, the stream
and the loop over branches (`vectors`, `stream`, `executor`), which linears run in fp8 (`precision`), what is allocated
for a shape of call (`shapes`, `workspace`, `graphs`, `rectified_flow`), which run and which weights a call is about
(`runs`, `identity` and those beside them), and what a user holds (`accelerate`, `handle`). A file here may import
`models`, `blocks`, `ops` and the settings; those of steps name no family.
"""
