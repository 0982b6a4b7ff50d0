"""The recipe of the packaged model `photo`; `python -m opensan.lab.photo --help` lists its steps."""
