"""taopd: on-policy distillation that trains only on the tokens that teach."""

__version__ = "0.1.0"
