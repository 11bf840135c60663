"""All formats by the names that `--to` takes. A new one is a file and a line here."""

from mae.formats import detectron2, facebook, onnx, pt2, segment_anything, timm, timm_folder, timm_sam
from mae.formats import hf_sam as huggingface_sam
from mae.formats import hf_vit as vit
from mae.formats import hf_vitmae as vitmae

FORMATS = {
    "facebook": facebook.FORMAT,
    "hf-vitmae": vitmae.FORMAT,
    "hf-vit": vit.FORMAT,
    "timm": timm.FORMAT,
    "timm-folder": timm_folder.FORMAT,
    "detectron2": detectron2.FORMAT,
    "onnx": onnx.FORMAT,
    "pt2": pt2.FORMAT,
    "segment-anything": segment_anything.FORMAT,
    "hf-sam": huggingface_sam.FORMAT,
    "timm-sam": timm_sam.FORMAT,
    "onnx-sam": onnx.SAM,
    "pt2-sam": pt2.SAM,
}
