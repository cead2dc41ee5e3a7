"""Thousands of videos: what is asked for, what is done, and who does it.

It runs pipelines and keeps a manifest of what comes out. A file here may import all rooms but `cli`; `on_ray.py` alone
imports Ray, and only when it is used.
"""
