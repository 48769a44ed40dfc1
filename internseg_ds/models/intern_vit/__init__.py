"""InternViT, plain and with a ViT-Adapter."""
