"""Adapters to other trainers. Each one is imported by name, pins a version, and imports its library alone."""
