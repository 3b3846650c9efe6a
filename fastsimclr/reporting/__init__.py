"""What fastsimclr.report is made of: the record of a run, charts and tables of it, and the page around them."""
