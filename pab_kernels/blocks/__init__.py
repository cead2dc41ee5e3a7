"""What a transformer is made of: the description that adapters fill in, and each branch as a function.

No state, no slots, no schedule. A file here may import `ops` and the settings, nothing above.
"""
