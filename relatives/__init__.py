"""Other low-rank methods that the two papers are read beside, one a file."""
