"""Data sets: where photographs and their labels come from, and what is done to them before training."""
