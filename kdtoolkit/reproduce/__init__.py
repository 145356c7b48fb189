"""Tables of papers as cells: what is published, and the run that reproduces it."""
