"""What a run may be asked for, beside `config.py`: types and ranges of settings, and what fits together.

Every check raises a `ConfigError` that names the setting.
"""
