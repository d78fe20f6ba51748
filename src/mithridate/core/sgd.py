"""What SGD is told, by itself or by those who follow its steps: settings with their ranges."""

from typing import Annotated

from pydantic import Field

LearningRate = Annotated[float, Field(gt=0, lt=1e6)]
"""Beyond the bound a step leaves the range in which float32 tells weights apart, whatever the model."""

Momentum = Annotated[float, Field(ge=0, lt=1)]
"""From 1 on, past gradients are never forgotten, and steps grow without end."""
