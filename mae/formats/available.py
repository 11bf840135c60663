"""All formats by the names that `--to` takes. A new one is a file and a line here."""

from mae.formats import (
    detectron2,
    facebook,
    hf_pixio,
    hf_sam,
    hf_vit,
    hf_vitmae,
    onnx,
    pt2,
    segment_anything,
    timm,
    timm_folder,
)

FORMATS = {
    "facebook": facebook.FORMAT,
    "hf-vitmae": hf_vitmae.FORMAT,
    "hf-vit": hf_vit.FORMAT,
    "hf-pixio": hf_pixio.FORMAT,
    "timm": timm.FORMAT,
    "timm-folder": timm_folder.FORMAT,
    "detectron2": detectron2.FORMAT,
    "onnx": onnx.FORMAT,
    "pt2": pt2.FORMAT,
    "segment-anything": segment_anything.FORMAT,
    "hf-sam": hf_sam.FORMAT,
    "timm-sam": timm_folder.SAM,
    "onnx-sam": onnx.SAM,
    "pt2-sam": pt2.SAM,
}
