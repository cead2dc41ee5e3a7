"""Pipelines: text and noise in, video out."""
