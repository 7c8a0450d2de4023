"""Conformance with the released code: reference vectors are read, computed again and compared."""
