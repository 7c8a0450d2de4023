"""From settings or given objects to a trainer: models, teachers, prompts, tools; made ready, or refused.

What is refused is a `ConfigError` that names the argument or setting, or a `DataError` that names the row.
"""
