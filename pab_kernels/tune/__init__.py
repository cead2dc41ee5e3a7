"""What chooses settings: profile, trials, frontier, search, results.

It runs pipelines and reads what comes out. A file here may import all rooms but `cli`.
"""
