"""Our ops in other people's training scripts: one line for a whole process, or one for a model."""

from posttrain.integrations.counting import counters
from posttrain.integrations.models import patch, unpatch
from posttrain.integrations.shared_prefix import shared_prefix
from posttrain.integrations.switch import disable, enable

__all__ = ["counters", "disable", "enable", "patch", "shared_prefix", "unpatch"]
