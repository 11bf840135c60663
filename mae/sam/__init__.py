"""Everything SAM-style: encoder, segmenter, prompts, interactive session, loss, scores, Lightning module."""
