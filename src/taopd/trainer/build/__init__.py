"""From settings or given objects to a trainer: models, teachers, prompts, tools; made ready, or refused."""
