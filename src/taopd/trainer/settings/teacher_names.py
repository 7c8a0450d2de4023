"""Names that stand for a teacher made of the student itself. No torch: the plan reads them too."""

OWN_TEACHERS = ("self", "self_ema")
"""Values of teacher_model_name_or_path: the student before training, or a moving average of it."""
