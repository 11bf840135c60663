"""Loss of every training image, for a table from which training chooses (`probe=losses`)."""

from typing import Literal

from pydantic import BaseModel, Field

from mae.models.classifier import Classifier
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import Encoder


class Losses(BaseModel, frozen=True, extra="forbid"):
    """Settings of the table; measures nothing, needs no labels.

    part_images  images whose rows are written together: what a kill can lose, on each rank
    """

    name: Literal["losses"]
    part_images: int = Field(20_000, ge=1)

    def refusal(self, model: Encoder | MaskedAutoencoder) -> str | None:
        """Returns why it cannot measure this model, None if it can."""
        if isinstance(model, MaskedAutoencoder):
            return None
        held = "a classifier" if isinstance(model, Classifier) else "an encoder only"
        return f"needs a decoder, and the checkpoint holds {held}: take the run that pre-trained it"
