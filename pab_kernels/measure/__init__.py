"""What times and checks: contenders, floor, benchmark, report, recorded runs, what is installed.

It changes nothing that is measured. A file here may import all rooms but `tune` and `cli`.
"""
