"""Random programs around loops over experts: whatever is rewritten must stay what it was."""
