"""What chooses settings: profile, trials, frontier, results."""
