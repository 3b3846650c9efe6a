"""Pre-training: the run and its loop, one step of it, and what it leaves as a record."""
