"""A trainer that `taopd check` samples and scores with: it never trains."""

from taopd.errors import ConfigError
from taopd.trainer.trainer import TeachabilityTrainer


class LookedAt(TeachabilityTrainer):
    """A trainer without the copy of the student that the steps of a run compare with.

    The copy takes the memory of the student's weights and, on a CPU, 2 s for each thousand million of them.
    """

    trains = False

    def train(self, *args, **kwargs):
        raise ConfigError("this trainer was made for a check: make a TeachabilityTrainer to train")
