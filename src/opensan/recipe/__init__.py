"""A training from one file: the model and data it names, validation with pictures, the model folder at the end."""
