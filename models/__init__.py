"""Adapters and hosts: one module a DiT family."""
