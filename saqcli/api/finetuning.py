"""Fine-tuning of a quantized module in one call, for those who need no loop of their own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.api.batches import BatchReader, Inputs, class_scores
from saqcli.api.info import quantization_of
from saqcli.config import TrainingSection
from saqcli.errors import ConfigError, DataError, UnsupportedModel
from saqcli.progress import SILENT, Progress
from saqcli.serialization import parse_object
from saqcli.tasks.classification import Score
from saqcli.training.trainer import SizedBatches, Trainer
