"""From settings to a trainer: loads and checks models, tokenizer and prompts; writes nothing."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.errors import ConfigError, TaopdError
from taopd.models.load_options import current_names

if TYPE_CHECKING:
    from taopd.trainer.settings_file import TrainSettings
    from taopd.trainer.trainer import TeachabilityTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a trainer is made of."""

    student: Any
    teacher: Any
    """None if it is behind a server, or the student itself; of several a mapping, as the trainer takes it."""
    tokenizer: Any
    train_dataset: Any
    eval_dataset: Any


def forget(path: Path, existed: bool) -> None:
    """Remove an empty run folder: transformers makes it as soon as it sees its name."""
    # Only if empty and made by us: a folder of the user's stays.
    if not existed and path.exists() and not any(path.iterdir()):
        path.rmdir()


def load_training_set(settings: "TrainSettings") -> Any:
    """The prompts that train; DataError: see `load_prompts`."""
    from taopd.models.prompts import load_prompts

    script = settings.script
    return load_prompts(
        str(script.dataset_name), config=script.dataset_config, split=script.dataset_train_split
    )


def load_inputs(settings: "TrainSettings", train_dataset: Any = None) -> Inputs:
    """Load and check everything that can be wrong; writes nothing.

    Args:
        train_dataset: of these settings, where it has been loaded already.
    """
    from trl import get_quantization_config

    from taopd.models import prompts as data

    script, args, chosen = settings.script, settings.training, settings.model
    student_path = str(chosen.model_name_or_path)
    common = shared_options(settings)
    # The student's own keywords win over what both models share.
    own = common | {"revision": chosen.model_revision} | current_names(args.model_init_kwargs)
    tokenizer = data.load_tokenizer(student_path, revision=own["revision"])
    if train_dataset is None:
        train_dataset = load_training_set(settings)
    eval_dataset = None
    if args.eval_strategy != "no" or args.eval_on_start:
        eval_dataset = data.load_prompts(
            str(script.dataset_name), config=script.dataset_config, split=script.dataset_test_split
        )
    quantization = get_quantization_config(chosen)
    if quantization is not None:
        own["quantization_config"] = quantization
    student = data.load_model(student_path, **own)
    if args.teachers is None:
        teacher = _load_teacher(args, student, tokenizer, common)
    else:
        teacher = _load_teachers(args, student, tokenizer, common)
    # They are loaded now: TRL refuses or ignores these once it is given a model.
    args.model_init_kwargs = args.teacher_model_init_kwargs = None
    return Inputs(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )


def _load_teacher(args: Any, student: Any, tokenizer: Any, common: dict[str, Any]) -> Any:
    """The teacher that these settings name; None if it is behind a server, or the student."""
    from taopd.teachers import load_teacher
    from taopd.trainer.settings.config_checks import OWN_TEACHERS

    if args.teacher_url is not None or args.teacher_model_name_or_path in OWN_TEACHERS:
        return None
    return load_teacher(
        str(args.teacher_model_name_or_path),
        student,
        tokenizer,
        revision=args.teacher_model_revision,
        init_kwargs=common | current_names(args.teacher_model_init_kwargs),
        quantization=args.teacher_quantization,
        cut_renamed_control_tokens=args.cut_renamed_control_tokens,
    )[0]


def _load_teachers(
    args: Any, student: Any, tokenizer: Any, common: dict[str, Any]
) -> dict[str, Any]:
    """By name the model, one for all names of the same weights, or the entry of a teacher behind a server."""
    from taopd.trainer.build.loaded_teacher import weights_of
    from taopd.trainer.settings.teacher_entries import check_teachers, naming, settings_of

    check_teachers(args, args.teachers)
    found, models = dict[str, Any](), dict[Hashable, Any]()
    for name, entry in args.teachers.items():
        own = settings_of(args, name, entry)
        key = weights_of(own, common)
        if key not in models:
            with naming(name):
                models[key] = _load_teacher(own, student, tokenizer, common)
        found[name] = entry if models[key] is None else models[key]
    return found


def shared_options(settings: "TrainSettings") -> dict[str, Any]:
    """Options of loading that student and teachers share where they have none of their own."""
    model = settings.model
    return {"attn_implementation": model.attn_implementation, "dtype": model.dtype}


def make_trainer(
    settings: "TrainSettings", inputs: Inputs, *, kind: type[Any] | None = None
) -> "TeachabilityTrainer":
    """The trainer of these settings.

    Args:
        kind: another class than `TeachabilityTrainer`, derived from it.
    """
    from trl import get_peft_config

    from taopd.trainer.build.named_trackers import check_trackers
    from taopd.trainer.checkpoint import resume as train_resume
    from taopd.trainer.trainer import TeachabilityTrainer

    try:
        check_trackers(settings.training.report_to)
        return (kind or TeachabilityTrainer)(
            model=inputs.student,
            teacher_model=inputs.teacher,
            args=settings.training,
            train_dataset=inputs.train_dataset,
            eval_dataset=inputs.eval_dataset,
            processing_class=inputs.tokenizer,
            peft_config=get_peft_config(settings.model),
        )
    except TaopdError:
        raise
    except OSError as error:  # transformers makes the output folder
        disk = train_resume.disk_error(error, Path(str(settings.training.output_dir)))
        where = error.filename or settings.training.output_dir
        raise disk or ConfigError(f"cannot use {where}: {error.strerror or error}") from error
    except ImportError as error:  # vLLM, PEFT methods, quantization
        raise ConfigError(f"a package that the settings need is missing: {error}") from error
    except ValueError as error:  # how TRL and peft refuse settings
        raise ConfigError(f"these settings do not fit together: {error}") from error
