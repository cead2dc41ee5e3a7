"""The demo model: generated scenes, its training script, and the check that it follows its prompt."""
