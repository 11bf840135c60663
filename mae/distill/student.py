"""Students: our encoders, with what they need to be compared with a teacher."""

from torch import Tensor, nn

from mae.distill.loss import Tokens, embedding_loss, token_loss
from mae.models.config import MAEConfig
from mae.models.masking import draw_masking
from mae.models.vit import Encoder, LayerNorm, initialise
from mae.sam.encoder import SamEncoder


def build_head(width: int, teacher_width: int) -> nn.Sequential:
    """Builds the head that predicts a teacher's tokens: Linear, LayerNorm, GELU, Linear."""
    head = nn.Sequential(
        nn.Linear(width, teacher_width), LayerNorm(teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width)
    )
    initialise(head)
    return head


class Student(Encoder):
    """Encoder with a head on its tokens, which runs and exports leave behind.

    teacher_width  of the tokens that the head predicts
    masking        says which patches are hidden from the student; None: none
    """

    def __init__(self, config: MAEConfig, teacher_width: int, masking: MAEConfig | None = None) -> None:
        super().__init__(config)
        self.masking = masking
        self.distillation_head = build_head(config.width, teacher_width)

    def imitate(self, images: Tensor, target: Tokens, noise: Tensor | None = None) -> Tensor:
        """Returns the cosine loss of class tokens and visible patches.

        images  [B, C, H, W]  normalised
        noise   [B, N]        uniform; needed if there is a masking
        """
        patches, ids = self.patchify(images), None
        if self.masking is not None:
            assert noise is not None, "a masking is drawn from noise"
            ids = draw_masking(noise, self.masking).ids_keep
            patches = patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))
        first = self.config.class_tokens
        predicted = self.distillation_head(self.encode_tokens(self.embed(patches, ids)))
        return token_loss(predicted[:, :first], predicted[:, first:], target, self.config.grid, ids)


class SamStudent(SamEncoder):
    """SAM-style encoder whose image embedding is to be the teacher's."""

    def imitate(self, images: Tensor, target: Tokens, noise: Tensor | None = None) -> Tensor:
        """Returns the mean squared error of the image embedding. Images [B, C, S, S] are whole: no noise is used."""
        # Not self(images): under FSDP this method is an entrance, and `forward` would be another one inside it.
        return embedding_loss(SamEncoder.forward(self, images), target)
