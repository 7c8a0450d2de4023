"""Usual names of settings that are called otherwise here, for messages: none of them is accepted."""

from collections.abc import Collection

from taopd.errors import nearest

MEANT = {
    "student": "model_name_or_path",
    "student_model": "model_name_or_path",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "prompts": "dataset_name",
    "train_data": "dataset_name",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "max_tokens": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "output": "output_dir",
}


def nearest_setting(name: str, known: Collection[str]) -> str:
    """As `nearest`, with the setting that a usual name means where it is a known one.

    Example:
        >>> nearest_setting("lr", ["learning_rate", "loss"])
        " Did you mean 'learning_rate'?"
    """
    meant = MEANT.get(name.replace("-", "_"))
    return f" Did you mean {meant!r}?" if meant in known else nearest(name, known)
