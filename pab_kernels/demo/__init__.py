"""The demo model: generated scenes, its training script, and the check that it follows its prompt.

How its weights came about; the pipeline that runs them is with the others in `pipelines`. A file here may import that
room and all below it.
"""
