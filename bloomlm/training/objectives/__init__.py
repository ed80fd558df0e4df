"""What a run minimises: one file for each objective, which the step uses without knowing which it is."""
