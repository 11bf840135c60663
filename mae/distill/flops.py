"""FLOPs of distillation by formula, counted as in mae/models/flops.py."""

from torch import nn

from mae.distill.student import SamStudent, Student
from mae.models.config import MAEConfig
from mae.models.flops import attention, linear
from mae.models.vit import Encoder
from mae.sam.encoder import SamEncoder
from mae.sam.flops import executed_sam_flops, sam_flops


def distillation_flops(student: Student | SamStudent, teacher: Encoder | SamEncoder) -> int:
    """Returns the FLOPs per image, for the MFU: the student forward and backward, the teacher forward."""
    if isinstance(student, SamStudent):
        return 3 * sam_flops(student.config) + teacher_forward(teacher)
    return 3 * student_forward(student) + teacher_forward(teacher)


def executed_distillation_flops(student: Student | SamStudent, teacher: Encoder | SamEncoder) -> int:
    """Returns what is computed of `distillation_flops`: pixels get no gradient; SAM's scores are computed again."""
    config = student.config
    patches = config.grid[0] * config.grid[1] if isinstance(student, SamStudent) else visible(student)
    pixels = linear(patches, config.patch_size**2 * config.in_channels, config.width)
    if isinstance(student, SamStudent):
        return executed_sam_flops(student.config) - pixels + teacher_forward(teacher)
    return distillation_flops(student, teacher) - pixels


def teacher_forward(teacher: Encoder | SamEncoder) -> int:
    """Counts the forward pass of a teacher on a whole image."""
    if isinstance(teacher, SamEncoder):
        return sam_flops(teacher.config)
    return encoder_forward(teacher.config, teacher.config.patches)


def student_forward(student: Student) -> int:
    """Counts the forward pass of a student and its head on the visible patches of an image."""
    tokens = visible(student) + student.config.class_tokens
    layers = (layer for layer in student.distillation_head if isinstance(layer, nn.Linear))
    head = sum(linear(tokens, layer.in_features, layer.out_features) for layer in layers)
    return encoder_forward(student.config, visible(student)) + head


def visible(student: Student) -> int:
    """Returns the number of patches that the student sees."""
    return student.config.patches if student.masking is None else student.masking.visible


def encoder_forward(config: MAEConfig, patches: int) -> int:
    """Counts the forward pass of an encoder on so many patches of an image."""
    tokens, width = patches + config.class_tokens, config.width
    block = 4 * linear(tokens, width, width) + attention(tokens, tokens, width)
    block += 2 * linear(tokens, width, int(width * config.mlp_ratio))
    return linear(patches, config.patch_values, width) + config.depth * block
