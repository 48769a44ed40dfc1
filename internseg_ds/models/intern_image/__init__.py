"""InternImage and its operator, DCNv3."""
