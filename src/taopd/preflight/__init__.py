"""`taopd check`: what most often breaks a distillation run, looked at before the GPU hours.

Each check is a function from plain values to a `verdict.Verdict`: end-of-sequence ids, chat template,
thinking mode, padded vocabulary, a stale adapter in the sampler. `subject` makes models and samples from
settings.
"""
