"""What more than one of the three scripts needs; each file holds one idea."""
