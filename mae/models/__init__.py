"""The network: a Vision Transformer encoder, a light decoder, and the masked autoencoder made of both."""
