"""What times and checks: contenders, floor, benchmark, report, recorded runs."""
