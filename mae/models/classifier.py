"""Classifier for fine-tuning: the encoder on all patches, pooling, a linear head."""

from typing import Literal

from torch import Tensor, nn

from mae.models.config import MAEConfig
from mae.models.drop_path import add_drop_path
from mae.models.vit import Encoder, LayerNorm

Pool = Literal["patches", "class_token"]

HEAD_STD = 2e-5  # as in the published fine-tuning: at first all classes score nearly alike


class Classifier(Encoder):
    """ViT classifier with the parameter names of the published fine-tuned weights: the encoder's, fc_norm, head.

    pool       "patches": the mean of the patch tokens, normalised after pooling (fc_norm) instead of before;
               "class_token": the class token, or the mean of several, normalised before (norm)
    drop_path  stochastic depth: rate of the last block, falling linearly to 0 at the first

    Positions are trained, also those that start as the sine-cosine table. Source: He et al. 2022, section A.1.
    """

    def __init__(self, config: MAEConfig, classes: int, pool: Pool = "patches", drop_path: float = 0.0) -> None:
        super().__init__(config)
        self.config = config.model_copy(update={"positions": "learned"})
        self.classes = classes
        self.class_names: list[str] = []  # by label, as many as there are classes; [] if unknown
        self.pool: Pool = pool
        self.pos_embed.requires_grad_(True)
        if pool == "patches":
            self.norm = nn.Identity()
            self.fc_norm = LayerNorm(config.width)
        else:
            self.fc_norm = nn.Identity()
        self.head = nn.Linear(config.width, classes)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        add_drop_path(self.blocks, drop_path)

    def like(self, config: MAEConfig) -> "Classifier":
        """Builds a classifier of the same classes and pooling, with another config, of random weights."""
        model = Classifier(config, self.classes, self.pool)
        model.class_names = self.class_names
        return model

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the class scores [B, classes] of normalised images [B, C, H, W].

        noise  [B, n]  uniform numbers from which stochastic depth draws in training; None: no branch is left out
        """
        return self.scores(self.encode_tokens(self.embed(self.patchify(images)), noise))

    def scores(self, latent: Tensor) -> Tensor:
        """Returns the class scores [B, classes] of a latent, the output of `encode`."""
        first = self.config.class_tokens
        pooled = latent[:, first:] if self.pool == "patches" else latent[:, :first]
        return self.head(self.fc_norm(pooled.mean(dim=1)))


def build_classifier(
    encoder: Encoder, classes: int, pool: Pool = "patches", drop_path: float = 0.0, keep_head: bool = False
) -> Classifier:
    """Builds a classifier from a pre-trained encoder, or from another classifier.

    The head is initialised unless `keep_head`; norms that the source does not have are, too.
    """
    model = Classifier(encoder.config, classes, pool, drop_path)
    own = model.state_dict()
    weights = {name: value for name, value in encoder.state_dict().items() if name in own}
    if not keep_head:
        weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    problems = model.load_state_dict(weights, strict=False)
    assert all(name.startswith(("fc_norm.", "norm.", "head.")) for name in problems.missing_keys), problems
    return model


def topk_correct(scores: Tensor, labels: Tensor, k: int) -> int:
    """Counts the images whose label [B] is among the k highest scores [B, classes]."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return int((best == labels[:, None]).sum())
