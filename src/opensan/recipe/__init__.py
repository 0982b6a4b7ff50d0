"""A training from one file of configuration: the model and data it names, validation with pictures, the model folder."""
