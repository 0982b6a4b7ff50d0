"""The network: modules and functions on tensors that know no data set, loss, or file."""

from opensan.model.san import SAN, build_san

__all__ = ["SAN", "build_san"]
