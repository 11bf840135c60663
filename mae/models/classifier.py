"""A classifier: the encoder on all patches, one vector of its tokens, and a linear layer."""

from typing import Literal, cast

from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae.models.config import MAEConfig
from mae.models.vit import Encoder, LayerNorm

Pool = Literal["patches", "class_token"]

HEAD_STD = 2e-5  # of the published fine-tuning: at first all classes are as good as equal


class Classifier(Encoder):
    """ViT classifier with the parameter names of the published fine-tuned weights: the encoder's, fc_norm, head.

    pool       "patches": the mean of the patch tokens, normed after pooling (fc_norm) and not before;
               "class_token": the class token, normed before (norm)
    drop_path  share of the images for which the last block is left out in training; earlier blocks linearly less

    Positions learn, also those that begin as the sine-cosine table. Source: He et al. 2022, section A.1.
    """

    def __init__(self, config: MAEConfig, classes: int, pool: Pool = "patches", drop_path: float = 0.0) -> None:
        super().__init__(config)
        self.config = config.model_copy(update={"positions": "learned"})
        self.classes = classes
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
        for number, block in enumerate(self.blocks):
            rate = drop_path * number / max(1, config.depth - 1)
            if rate > 0:
                cast(Block, block).drop_path1 = DropPath(rate)
                cast(Block, block).drop_path2 = DropPath(rate)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], normalised -> scores of the classes [B, classes]."""
        return self.scores(self.encode(images))

    def scores(self, latent: Tensor) -> Tensor:
        """What `encode` gives -> scores of the classes [B, classes]."""
        first = int(self.config.class_token)
        pooled = latent[:, first:].mean(dim=1) if self.pool == "patches" else latent[:, 0]
        return self.head(self.fc_norm(pooled))


def classifier_of(encoder: Encoder, classes: int, pool: Pool = "patches", drop_path: float = 0.0) -> Classifier:
    """A classifier that begins with the weights of a pre-trained encoder; fc_norm and head are fresh."""
    model = Classifier(encoder.config, classes, pool, drop_path)
    weights = {name: value for name, value in encoder.state_dict().items() if name in model.state_dict()}
    problems = model.load_state_dict(weights, strict=False)
    assert all(name.startswith(("fc_norm.", "head.")) for name in problems.missing_keys), problems
    return model


def has_head(state: dict[str, Tensor]) -> bool:
    """Whether weights are a classifier's."""
    return "head.weight" in state


def classifier_for(state: dict[str, Tensor], config: MAEConfig) -> Classifier:
    """A classifier, without their values, that the weights fit into."""
    return Classifier(config, len(state["head.weight"]), "patches" if "fc_norm.weight" in state else "class_token")


def topk_correct(scores: Tensor, labels: Tensor, k: int) -> int:
    """For how many images [B, classes] the label [B] is among the k highest scores."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return int((best == labels[:, None]).sum())
