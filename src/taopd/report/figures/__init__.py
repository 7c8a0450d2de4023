"""Figures: the PNG pictures that commands draw beside their tables."""
