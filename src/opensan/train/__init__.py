"""Learning: the set criterion, the optimizer's groups, and a trainer that survives being killed."""
