"""A run folder on disk: where it is, what its files hold, and how they are read and written. No torch."""
