"""What faults.py does: kinds of faults and attacks, each a list of trials that a seed repeats."""
