"""Train and test every variant of the paper's claims with equal budgets: `opensan lab ablate`."""
