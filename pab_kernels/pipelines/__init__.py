"""Pipelines: text and noise in, video out.

Text encoders, samplers, decoders, sizes, and the memory of a run, planned before anything is allocated. A file here may
import the runtime and all below it; the runtime knows of no pipeline.
"""
