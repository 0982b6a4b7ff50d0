"""Train from one configuration file, which names model and data; write validations and the final model folder."""
